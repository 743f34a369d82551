"""The specification of the bottleneck adapter, sequential and parallel, in plain PyTorch.

Shapes   x (M, K); down_weight (R, K); up_weight (N, R).
Maths    y = base + out(s (H Uᵀ + u)),  H = drop(f(T)),  T = in(x) Dᵀ + d        (paper eq. 4)
         where in / out are the identity or a LayerNorm, and base = x when sequential.
Saved    x and T. Nothing of size M x N.

Activations may be of lower precision than the small matrices. The matrices are then cast, and their
gradients are accumulated in their own dtype. Gradients that ``needs`` does not request are empty
tensors. The functions ``.._in_blocks`` compute the same, a block of rows at a time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common.activations import activate, derivative
from pelt_fast.ops.common.bundles import (
    LAYER_NORM_EPS,
    AdapterNorm,
    Bottleneck,
    Transform,
    absent,
)
from pelt_fast.ops.common.dropout import dropout, row_blocks
from pelt_fast.ops.common.products import outer


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) over the last dim and 1 / sqrt(var + eps), at least fp32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS)
    return centred * rstd, rstd


def layer_norm_backward(dy: Tensor, normed: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """Gradient of ``normalise(x) * weight + bias`` to x, in dy's dtype."""
    dn = dy.to(normed.dtype) * weight.to(normed.dtype)
    mean = dn.mean(-1, keepdim=True)
    return (rstd * (dn - mean - normed * (dn * normed).mean(-1, keepdim=True))).to(dy.dtype)


def _affine(normed: Tensor, norm: AdapterNorm, dtype: torch.dtype) -> Tensor:
    weight, bias = norm.norm_weight.to(normed.dtype), norm.norm_bias.to(normed.dtype)
    return (normed * weight + bias).to(dtype)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def adapter_forward(
    x: Tensor,
    base: Tensor | None,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    keep_t: bool = True,
    *,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and T (M, R). ``base=None`` is the sequential adapter: base is x itself.
    Without ``keep_t`` an empty tensor replaces T.

    ``first_row``: the index of x's first row in the taller tensor of the dropout mask.
    """
    (down_weight, down_bias, up_weight, up_bias), (activation, scale, *drop) = adapter, transform
    u = _affine(normalise(x)[0], norm, x.dtype) if norm.layer_norm == "in" else x
    t = _add_bias(u @ down_weight.to(x.dtype).t(), down_bias)
    h = dropout(activate(activation, t), *drop, first_row * t.shape[1])
    z = scale * _add_bias(h @ up_weight.to(x.dtype).t(), up_bias)
    if norm.layer_norm == "out":
        z = _affine(normalise(z)[0], norm, x.dtype)
    return (x if base is None else base) + z, t if keep_t else absent(t)


def adapter_backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    sequential: bool,
    needs: Sequence[bool],
    *,
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx and the gradients of down_weight, down_bias, up_weight, up_bias, norm_weight,
    norm_bias; ``needs`` holds a flag for each. The gradient of a parallel base is dy itself.

    dZ = s dy;  dU = dZᵀ H;  dH = dZ U;  dT = drop(dH) f'(T);  dD = dTᵀ in(x);  dx = dT D (+ dy).
    """
    (down_weight, _, up_weight, up_bias), (activation, scale, *drop) = adapter, transform
    grads = [absent(dy) for _ in range(7)]
    first = first_row * t.shape[1]
    h = dropout(activate(activation, t), *drop, first)
    dz = dy
    if norm.layer_norm == "out":
        z = scale * _add_bias(h @ up_weight.to(dy.dtype).t(), up_bias)
        normed, rstd = normalise(z)
        dz = layer_norm_backward(dy, normed, rstd, norm.norm_weight)
        _norm_gradients(grads, dy, normed, norm, needs)
    dt = dropout(scale * (dz @ up_weight.to(dy.dtype)), *drop, first)
    dt = dt * derivative(activation, t)
    if needs[3]:
        grads[3] = scale * outer(dz, h, up_weight.dtype)
    if needs[4]:
        grads[4] = scale * dz.sum(0, dtype=up_bias.dtype)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    du = dt @ down_weight.to(dy.dtype)
    u = x
    if norm.layer_norm == "in":
        normed, rstd = normalise(x)
        u = _affine(normed, norm, x.dtype)
        _norm_gradients(grads, du, normed, norm, needs)
        du = layer_norm_backward(du, normed, rstd, norm.norm_weight)
    if needs[1]:
        grads[1] = outer(dt, u, down_weight.dtype)
    if needs[0]:
        grads[0] = du + dy if sequential else du
    return tuple(grads)


def _norm_gradients(
    grads: list[Tensor], dy: Tensor, normed: Tensor, norm: AdapterNorm, needs: Sequence[bool]
) -> None:
    """The gradients of the LayerNorm's weight and bias, from the gradient of its output."""
    if needs[5]:
        grads[5] = (dy * normed).sum(0).to(norm.norm_weight.dtype)
    if needs[6]:
        grads[6] = dy.sum(0, dtype=norm.norm_bias.dtype)


def adapter_forward_in_blocks(
    x: Tensor,
    base: Tensor | None,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    keep_t: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`adapter_forward`, a block of rows at a time."""
    residual = x if base is None else base
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    t = x.new_empty(x.shape[0], adapter.down_weight.shape[0]) if keep_t else absent(x)
    for rows in row_blocks(x):
        out[rows], kept = adapter_forward(
            x[rows], residual[rows], adapter, norm, transform, keep_t, first_row=rows.start
        )
        if keep_t:
            t[rows] = kept
    return out, t


def adapter_backward_in_blocks(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    sequential: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`adapter_backward`, a block of rows at a time; sums the weights' gradients."""
    down_weight, _, up_weight, up_bias = adapter
    weights = (down_weight, down_weight[:, 0], up_weight, up_bias, norm.norm_weight, norm.norm_bias)
    grads = [absent(dy) for _ in range(7)]
    if needs[0]:
        grads[0] = torch.empty_like(x, memory_format=torch.contiguous_format)
    for i, like in enumerate(weights, 1):
        if needs[i]:
            grads[i] = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for rows in row_blocks(x):
        block = adapter_backward(
            dy[rows], x[rows], t[rows], adapter, norm, transform, sequential, needs,
            first_row=rows.start,
        )  # fmt: skip
        if needs[0]:
            grads[0][rows] = block[0]
        for i in range(1, 7):
            if needs[i]:
                grads[i] += block[i]
    return tuple(grads)
