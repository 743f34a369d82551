"""Low rank: the LoRA linear and the sequential / parallel adapter.

Shapes   x (M, K), weight (N, K), bias (N); lora_a, down_weight (R, K); lora_b, up_weight (N, R).
Maths    LoRA     y = x Wᵀ + b + s S Bᵀ,              S = drop(x) Aᵀ              (paper eq. 6)
         adapter  y = base + out(s (H Uᵀ + u)),       H = drop(f(T)), T = in(x) Dᵀ + d   (eq. 4)
         where in / out are the identity or a LayerNorm, and base = x when sequential.
Saved    LoRA: x and S. Adapter: x and T. Nothing of size M x N.

Activations may be of lower precision than the small matrices: those are then cast, and their
gradients are accumulated in their own dtype. Gradients that ``needs`` does not ask for are empty
tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, derivative
from .philox import dropout

LAYER_NORM_EPS = 1e-5


def empty_like_nothing(x: Tensor) -> Tensor:
    """What an op returns in the place of a gradient nobody needs."""
    return x.new_empty(0)


def outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ right`` (weight gradient), accumulated and returned in at least ``dtype``."""
    wide = torch.promote_types(left.dtype, dtype)
    return (left.to(wide).t() @ right.to(wide)).to(dtype)


def lora_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, R)."""
    s = dropout(x, dropout_p, seed) @ lora_a.to(x.dtype).t()
    y = F.linear(x, weight, bias) + scale * (s @ lora_b.to(x.dtype).t())
    return y, s


def lora_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, da, db; ``needs`` holds a flag for each. ``x`` is read for da, ``s`` for db.

    dS = s dy B;  da = dSᵀ drop(x);  db = s dyᵀ S;  dx = dy W + drop(dS A).
    """
    dx, da, db = (empty_like_nothing(dy) for _ in range(3))
    ds = scale * (dy @ lora_b.to(dy.dtype))
    if needs[0]:
        dx = dy @ weight + dropout(ds @ lora_a.to(dy.dtype), dropout_p, seed)
    if needs[1]:
        da = outer(ds, dropout(x, dropout_p, seed), lora_a.dtype)
    if needs[2]:
        db = scale * outer(dy, s, lora_b.dtype)
    return dx, da, db


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


def _affine(normed: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return (normed * weight.to(normed.dtype) + bias.to(normed.dtype)).to(dtype)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)


def adapter_forward(
    x: Tensor,
    base: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    layer_norm: str,
    activation: str,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    keep_t: bool = True,
    first_row: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and T (M, R). ``base=None`` is the sequential adapter: base is x itself.
    Without ``keep_t`` an empty tensor stands for T.

    ``first_row``: where x's rows start in the taller tensor the dropout mask is defined on.
    """
    u = _affine(normalise(x)[0], norm_weight, norm_bias, x.dtype) if layer_norm == "in" else x
    t = _add_bias(u @ down_weight.to(x.dtype).t(), down_bias)
    h = dropout(activate(activation, t), dropout_p, seed, first_row * t.shape[1])
    z = scale * _add_bias(h @ up_weight.to(x.dtype).t(), up_bias)
    if layer_norm == "out":
        z = _affine(normalise(z)[0], norm_weight, norm_bias, x.dtype)
    return (x if base is None else base) + z, t if keep_t else empty_like_nothing(t)


def adapter_backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    layer_norm: str,
    activation: str,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    sequential: bool,
    needs: Sequence[bool],
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx and the gradients of down_weight, down_bias, up_weight, up_bias, norm_weight,
    norm_bias; ``needs`` holds a flag for each. The gradient of a parallel base is dy itself.

    dZ = s dy;  dU = dZᵀ H;  dH = dZ U;  dT = drop(dH) f'(T);  dD = dTᵀ in(x);  dx = dT D (+ dy).
    """
    grads = [empty_like_nothing(dy) for _ in range(7)]
    first = first_row * t.shape[1]
    h = dropout(activate(activation, t), dropout_p, seed, first)
    dz = dy
    if layer_norm == "out":
        z = scale * _add_bias(h @ up_weight.to(dy.dtype).t(), up_bias)
        normed, rstd = normalise(z)
        dz = layer_norm_backward(dy, normed, rstd, norm_weight)
        if needs[5]:
            grads[5] = (dy * normed).sum(0).to(norm_weight.dtype)
        if needs[6]:
            grads[6] = dy.sum(0, dtype=norm_bias.dtype)
    dt = dropout(scale * (dz @ up_weight.to(dy.dtype)), dropout_p, seed, first)
    dt = dt * derivative(activation, t)
    if needs[3]:
        grads[3] = scale * outer(dz, h, up_weight.dtype)
    if needs[4]:
        grads[4] = scale * dz.sum(0, dtype=up_bias.dtype)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    du = dt @ down_weight.to(dy.dtype)
    u = x
    if layer_norm == "in":
        normed, rstd = normalise(x)
        u = _affine(normed, norm_weight, norm_bias, x.dtype)
        if needs[5]:
            grads[5] = (du * normed).sum(0).to(norm_weight.dtype)
        if needs[6]:
            grads[6] = du.sum(0, dtype=norm_bias.dtype)
        du = layer_norm_backward(du, normed, rstd, norm_weight)
    if needs[1]:
        grads[1] = outer(dt, u, down_weight.dtype)
    if needs[0]:
        grads[0] = du + dy if sequential else du
    return tuple(grads)


def fold_scale(
    scale: Tensor, up_weight: Tensor, up_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fold a learned scale, scalar () or (1,) or per channel (N), into the small matrices.

    s (H Uᵀ + u) = H (diag(s) U)ᵀ + s u, so the op itself only sees a fixed scale.
    """
    column = scale.reshape(-1, 1)
    return column * up_weight, None if up_bias is None else scale.reshape(-1) * up_bias


def fold_scale_backward(
    d_up: Tensor, d_up_bias: Tensor | None, scale: Tensor, up_weight: Tensor, up_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`fold_scale` to scale, up_weight, up_bias.

    With G = dyᵀ H the gradient of the folded matrix: ds_j = <U_j, G_j> + u_j sum dy_j, summed over
    j for a scalar. Exact for any s, also 0, and nothing of size M x N was saved for it.
    """
    per_channel = (up_weight * d_up).sum(1)
    if up_bias is not None:
        per_channel = per_channel + up_bias * d_up_bias
    ds = (per_channel if scale.numel() > 1 else per_channel.sum()).reshape(scale.shape)
    d_bias = None if up_bias is None else scale.reshape(-1) * d_up_bias
    return ds, scale.reshape(-1, 1) * d_up, d_bias
