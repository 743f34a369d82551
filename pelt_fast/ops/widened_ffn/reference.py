"""The specification of a feed-forward block with a parallel adapter, as one function.

Shapes   x (M, K); in_weight, gate_weight (F, K); out_weight (N, F); down_weight (R, K);
         up_weight (N, R); pre (M, F + R), gated (M, 2F + R): pre-activations [gate | in | down].
Maths    Z = x W1ᵀ + b1;  G = x Wgᵀ + bg (gated);  T = x' Dᵀ + d, x' = x or adapter_x (M, K)
         A = drop_a(φ(Z)) or drop_a(φ(G) Z);       H = drop(f(T))
         y = drop_o(A W2ᵀ + b2) + s (H Uᵀ + u)                            (docs/maths.md#i3)
         The adapter is added after the output dropout, as in the paper's models (section 3.3).
         With an ``adapter_x`` it reads another tensor than the block (mBART's residual stream).
Saved    x' and pre; if dx is not needed, x' and T alone.

The seed of ``settings`` has three rows: bottleneck, activation and output dropout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common.activations import activate, derivative
from pelt_fast.ops.common.bundles import (
    Bottleneck,
    FFNMatrices,
    FFNSettings,
    FrozenFFN,
    Packed,
    absent,
)
from pelt_fast.ops.common.dropout import dropout, seed_row
from pelt_fast.ops.common.products import outer


def _drop(x: Tensor, p: float, settings: FFNSettings, row: int) -> Tensor:
    return dropout(x, p, seed_row(settings.seed, row, p))


def _split(pre: Tensor, inner: int, gated: bool, rank: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Views of ``pre``: gate (or None), in, down."""
    first = inner if gated else 0
    gate = pre[:, :inner] if gated else None
    last = first + inner
    return gate, pre[:, first:last], pre[:, last : last + rank]


def ffn_forward(
    x: Tensor,
    adapter_x: Tensor | None,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    packed: Packed,
    settings: FFNSettings,
    keep_pre: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and pre; without ``keep_pre`` an empty tensor replaces pre.

    ``packed`` holds the same weights stacked, perhaps with zeros after them. Only the backends read
    them. Here ``packed`` only gives the width of ``pre``.
    """
    low, (down_weight, down_bias, up_weight, up_bias) = x.dtype, adapter
    parts = [F.linear(x, ffn.in_weight, ffn.in_bias)]
    if ffn.gate_weight is not None:
        parts.insert(0, F.linear(x, ffn.gate_weight, ffn.gate_bias))
    small = down_weight.to(low), None if down_bias is None else down_bias.to(low)
    parts.append(F.linear(x if adapter_x is None else adapter_x, *small))
    pre = torch.cat(parts, 1)
    if packed.packed is not None:
        pre = F.pad(pre, (0, packed.packed.shape[0] - pre.shape[1]))
    gated = ffn.gate_weight is not None
    gate, z, t = _split(pre, ffn.in_weight.shape[0], gated, down_weight.shape[0])
    a = activate(settings.ffn_activation, z if gate is None else gate)
    a = _drop(a if gate is None else a * z, settings.activation_dropout_p, settings, 1)
    h = _drop(activate(settings.activation, t), settings.dropout_p, settings, 0)
    small = up_weight.to(low), None if up_bias is None else up_bias.to(low)
    update = settings.scale * F.linear(h, *small)
    y = _drop(F.linear(a, ffn.out_weight, ffn.out_bias), settings.output_dropout_p, settings, 2)
    return y + update, pre if keep_pre else absent(pre)


def ffn_backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    weights: FFNMatrices,
    packed: Packed,
    settings: FFNSettings,
    separate: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dx and the gradients of down_weight, down_bias, up_weight, up_bias, adapter_x.

    ``x`` is the adapter's input. If it is ``separate`` from the block's input, dT D is the last
    gradient and no part of dx.

    dA = drop_o(dy) W2;  dZ = drop_a(dA) φ'(Z) (times the gate);  dT = drop(s dy U) f'(T)
    dx = dZ W1 (+ dG Wg) + dT D;  dD = dTᵀ x;  dU = s dyᵀ H.
    Without ``needs[0]`` only T is read, and ``pre`` may be T alone.
    """
    low, p, scale = dy.dtype, settings.dropout_p, settings.scale
    down_weight, up_weight = weights.down_weight, weights.up_weight
    grads = [absent(dy) for _ in range(6)]
    inner, rank = weights.in_weight.shape[0], down_weight.shape[0]
    gated = weights.gate_weight is not None
    t = pre if pre.shape[1] == rank else _split(pre, inner, gated, rank)[2]
    h = _drop(activate(settings.activation, t), p, settings, 0)
    dt = _drop(scale * (dy @ up_weight.to(low)), p, settings, 0)
    dt = dt * derivative(settings.activation, t)
    if needs[0]:
        gate, z, _ = _split(pre, inner, gated, rank)
        dx = _block_input_gradient(dy, gate, z, weights, settings)
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


def _block_input_gradient(
    dy: Tensor, gate: Tensor | None, z: Tensor, weights: FFNMatrices, settings: FFNSettings
) -> Tensor:
    """The frozen block's part of dx: dZ W1 (+ dG Wg)."""
    name = settings.ffn_activation
    da = _drop(dy, settings.output_dropout_p, settings, 2) @ weights.out_weight
    da = _drop(da, settings.activation_dropout_p, settings, 1)
    if gate is None:
        return (da * derivative(name, z)) @ weights.in_weight
    dx = (da * activate(name, gate)) @ weights.in_weight
    return dx + (da * z * derivative(name, gate)) @ weights.gate_weight
