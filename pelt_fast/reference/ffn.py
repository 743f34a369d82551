"""Widened FFN: a feed-forward block with a parallel adapter, as one function (identity I3).

Shapes   x (M, K); in_weight, gate_weight (F, K); out_weight (N, F); down_weight (R, K);
         up_weight (N, R); pre (M, F + R), gated (M, 2F + R): pre-activations [gate | in | down].
Maths    Z = x W1ᵀ + b1;  G = x Wgᵀ + bg (gated);  T = x' Dᵀ + d, x' = x or adapter_x (M, K)
         A = drop_a(φ(Z)) or drop_a(φ(G) Z);       H = drop(f(T))
         y = drop_o(A W2ᵀ + b2) + s (H Uᵀ + u)
         The adapter is added after the output dropout, as in the paper's models (section 3.4).
         With an ``adapter_x`` it reads another tensor than the block (mBART's residual stream).
Saved    x' and pre; where no dx is asked for, x' and T alone.

``seed`` has three rows: bottleneck, activation and output dropout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import activate, derivative
from .low_rank import empty_like_nothing, outer
from .philox import dropout


def _drop(x: Tensor, p: float, seed: Tensor | None, row: int) -> Tensor:
    return dropout(x, p, None if seed is None or p == 0 else seed[row])


def _split(pre: Tensor, inner: int, gated: bool, rank: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Views of ``pre``: gate (or None), in, down."""
    first = inner if gated else 0
    gate = pre[:, :inner] if gated else None
    last = first + inner
    return gate, pre[:, first:last], pre[:, last : last + rank]


def ffn_forward(
    x: Tensor,
    adapter_x: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    packed: Tensor | None,
    packed_out: Tensor | None,
    ffn_activation: str,
    activation: str,
    scale: float,
    dropout_p: float,
    activation_dropout_p: float,
    output_dropout_p: float,
    seed: Tensor | None,
    keep_pre: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and pre, without ``keep_pre`` an empty tensor in its place.

    ``packed`` holds the same weights stacked, perhaps with rows of zeros below, ``packed_out``
    [W2 | s U | zeros]: for plans. Here ``packed`` only says how wide ``pre`` is.
    """
    low = x.dtype
    parts = [F.linear(x, in_weight, in_bias)]
    if gate_weight is not None:
        parts.insert(0, F.linear(x, gate_weight, gate_bias))
    small = down_weight.to(low), None if down_bias is None else down_bias.to(low)
    parts.append(F.linear(x if adapter_x is None else adapter_x, *small))
    pre = torch.cat(parts, 1)
    if packed is not None:
        pre = F.pad(pre, (0, packed.shape[0] - pre.shape[1]))
    gate, z, t = _split(pre, in_weight.shape[0], gate_weight is not None, down_weight.shape[0])
    a = activate(ffn_activation, z) if gate is None else activate(ffn_activation, gate) * z
    a = _drop(a, activation_dropout_p, seed, 1)
    h = _drop(activate(activation, t), dropout_p, seed, 0)
    update = scale * F.linear(h, up_weight.to(low), None if up_bias is None else up_bias.to(low))
    y = _drop(F.linear(a, out_weight, out_bias), output_dropout_p, seed, 2) + update
    return y, pre if keep_pre else empty_like_nothing(pre)


def ffn_backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    in_weight: Tensor,
    gate_weight: Tensor | None,
    out_weight: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    packed: Tensor | None,
    packed_out: Tensor | None,
    ffn_activation: str,
    activation: str,
    scale: float,
    dropout_p: float,
    activation_dropout_p: float,
    output_dropout_p: float,
    seed: Tensor | None,
    separate: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx and the gradients of down_weight, down_bias, up_weight, up_bias, adapter_x.

    ``x`` is what the adapter read: where that is ``separate`` from the block's input, dT D is the
    last gradient and no part of dx.

    dA = drop_o(dy) W2;  dZ = drop_a(dA) φ'(Z) (times the gate);  dT = drop(s dy U) f'(T)
    dx = dZ W1 (+ dG Wg) + dT D;  dD = dTᵀ x;  dU = s dyᵀ H.
    Without ``needs[0]`` only T is read, and ``pre`` may be T alone.
    """
    low = dy.dtype
    grads = [empty_like_nothing(dy) for _ in range(6)]
    rank, gated = down_weight.shape[0], gate_weight is not None
    t = pre if pre.shape[1] == rank else _split(pre, in_weight.shape[0], gated, rank)[2]
    h = _drop(activate(activation, t), dropout_p, seed, 0)
    dt = _drop(scale * (dy @ up_weight.to(low)), dropout_p, seed, 0) * derivative(activation, t)
    if needs[0]:
        gate, z, _ = _split(pre, in_weight.shape[0], gated, rank)
        da = _drop(_drop(dy, output_dropout_p, seed, 2) @ out_weight, activation_dropout_p, seed, 1)
        if gate is None:
            dx = (da * derivative(ffn_activation, z)) @ in_weight
        else:
            dx = (da * activate(ffn_activation, gate)) @ in_weight
            dx = dx + (da * z * derivative(ffn_activation, gate)) @ gate_weight
        grads[0] = dx if separate else dx + dt @ down_weight.to(low)
    if needs[1]:
        grads[1] = outer(dt, x, down_weight.dtype)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[3]:
        grads[3] = scale * outer(dy, h, up_weight.dtype)
    if needs[4]:
        grads[4] = scale * dy.sum(0, dtype=up_weight.dtype)
    if needs[5]:
        grads[5] = dt @ down_weight.to(low)
    return tuple(grads)
