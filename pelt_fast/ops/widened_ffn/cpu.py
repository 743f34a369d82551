"""The widened block on library GEMMs, packed if there are stacked weights.

Shapes and maths are those of ``reference``; P = one M x N pass, Q = one M x F pass.
Traffic  forward    [W1; D] is one GEMM that reads x once; φ, its dropout; [W2 | s U] is one GEMM.
                    With an output dropout of the model: W2, then one pass over y drops and adds
                    s H Uᵀ + s u in row blocks. If the adapter reads another tensor: W1 and D
                    are two GEMMs each way, each with its own input and output.
         backward   dy for dT, dU and du, one GEMM [dZ | dT] [W1; D] for dx. dZ
                    overwrites dA.
Flops    (F + R) / F of the frozen block's, plus 2MR(K + N) for the two weight gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common.bundles import (
    Bottleneck,
    FFNMatrices,
    FFNSettings,
    FrozenFFN,
    Packed,
    absent,
)
from pelt_fast.ops.common.dropout import drop, ffn_dropouts
from pelt_fast.ops.common.gradients import (
    activation_backward,
    down_gradients,
    fill,
    stacked_input_gradient,
    up_gradients,
)
from pelt_fast.ops.common.passes import (
    activate,
    activation_buffer,
    covers_rows,
    out_projection,
    stacked_linear,
)


def ffn_forward(
    x: Tensor,
    adapter_x: Tensor | None,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    packed: Packed,
    settings: FFNSettings,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    bottleneck_drop, inner_drop, output_drop = ffn_dropouts(settings)
    pre = stacked_linear(x, adapter_x, ffn, adapter, packed.packed)
    covered = covers_rows(pre)
    gated = ffn.gate_weight is not None
    inner, rank = ffn.in_weight.shape[0], adapter.down_weight.shape[0]
    act = activation_buffer(pre, inner, rank, gated, keep_pre)
    first = inner if gated else 0
    z = pre[:, inner : 2 * inner] if gated else None
    p, seed = inner_drop
    activate(
        settings.ffn_activation, pre[:, :inner], act[:, :inner], linear=z, p=p, seed=seed,
        covered=covered,
    )  # fmt: skip
    t, h = pre[:, first + inner : first + inner + rank], act[:, inner : inner + rank]
    p, seed = bottleneck_drop
    activate(settings.activation, t, h, p=p, seed=seed, covered=covered)
    y = out_projection(
        act, inner, ffn, adapter, packed.packed_out, settings.scale, output_drop, covered=covered
    )
    return y, pre if keep_pre else absent(pre)


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
    bottleneck_drop, inner_drop, output_drop = ffn_dropouts(settings)
    grads, covered = [absent(dy)] * 6, covers_rows(dy)
    rank, width = weights.down_weight.shape[0], weights.in_weight.shape[0]
    first = width if weights.gate_weight is None else 2 * width
    first = 0 if pre.shape[1] == rank else first
    t = pre[:, first : first + rank]
    p, seed = bottleneck_drop
    h = None
    if needs[3]:
        h = activate(settings.activation, t, p=p, seed=seed, covered=covered)
    need_dt = any(needs[:3]) or needs[5]
    in_one = needs[0] and packed.packed_out is not None and output_drop.seed is None
    d_pre = dt = None
    if need_dt:
        d_pre = torch.empty_like(pre, memory_format=torch.contiguous_format)
        d_pre[:, first + rank :] = 0  # the padding of the packed rows
        dt = d_pre[:, first : first + rank]
    _, *found = up_gradients(
        dy, h, weights.up_weight, settings.scale, need_dh=need_dt and not in_one,
        need_bias=needs[4], dh=dt, covered=covered,
    )  # fmt: skip
    fill(grads, [3, 4], found)
    if not need_dt:
        return tuple(grads)
    if in_one:
        start = first - width
        both = d_pre[:, start : start + width + rank]
        torch.mm(dy, packed.packed_out[:, : width + rank], out=both)
    activation_backward(settings.activation, dt, t, p=p, seed=seed, covered=covered)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=weights.down_weight.dtype)
    if needs[1] or needs[5]:
        found = down_gradients(
            dt, x, weights.down_weight, need_dx=needs[5], need_da=needs[1],
            covered=covered and x.stride(-1) == 1,
        )  # fmt: skip
        fill(grads, [5, 1], found)
    if needs[0]:
        if not in_one:
            da = d_pre[:, first - width : first]
            torch.mm(drop(dy, *output_drop), weights.out_weight, out=da)
        p, seed = inner_drop
        gate, da = {}, d_pre[:, :width]
        if weights.gate_weight is not None:
            gate, da = dict(linear=pre[:, width : 2 * width], dt=da), d_pre[:, width : 2 * width]
        activation_backward(
            settings.ffn_activation, da, pre[:, :width], **gate, p=p, seed=seed, covered=covered
        )
        grads[0] = stacked_input_gradient(d_pre, weights, packed.packed, separate)
    return tuple(grads)
