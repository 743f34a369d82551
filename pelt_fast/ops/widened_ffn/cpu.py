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

from collections.abc import Callable, Iterator, Sequence

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
    product,
    stacked_input_gradient,
    up_gradients,
)
from pelt_fast.ops.common.passes import (
    activate,
    activation_buffer,
    covers_rows,
    few_linear,
    few_update,
    out_projection,
    reads_few,
    stacked_linear,
    takes_few,
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
    plain = settings.seed is None and packed.packed is None and packed.packed_out is None
    if plain and _takes_few(x, adapter_x, ffn, adapter):
        return _few_forward(x, adapter_x, ffn, adapter, settings, keep_pre)
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


def _takes_few(x: Tensor, adapter_x: Tensor | None, ffn: FrozenFFN, adapter: Bottleneck) -> bool:
    """Whether :func:`_few_forward` takes x (M, K) and these weights."""
    weights = [weight for weight in ffn[::2] if weight is not None]
    biases = [bias for bias in ffn[1::2] if bias is not None]
    frozen = all(reads_few(x, w) for w in weights) and all(b.dtype is x.dtype for b in biases)
    sources = [x] if adapter_x is None else [x, adapter_x]
    return frozen and all(takes_few(source, adapter) for source in sources)


def _few_forward(
    x: Tensor,
    adapter_x: Tensor | None,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    settings: FFNSettings,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """y and pre of a few rows without dropout: the block, then the adapter in one call. y has the
    same bits whether pre is kept or not: the activation runs on the same layout."""
    gate = [] if ffn.gate_weight is None else [few_linear(x, ffn.gate_weight, ffn.gate_bias)]
    parts = [*gate, few_linear(x, ffn.in_weight, ffn.in_bias)]
    pre, t = absent(x), None
    if keep_pre:
        width, rank = sum(part.shape[1] for part in parts), adapter.down_weight.shape[0]
        pre = x.new_empty(x.shape[0], width + rank)
        torch.cat(parts, 1, out=pre[:, :width])
        t = pre[:, width:]
    a = parts[0]
    activate(settings.ffn_activation, a, a, linear=parts[1] if gate else None, covered=True)
    y = few_linear(a, ffn.out_weight, ffn.out_bias)
    source = x if adapter_x is None else adapter_x.contiguous()
    few_update(y, source, adapter, settings.scale, settings.activation, t, in_place=True)
    return y, pre


def ffn_step(
    x: Tensor,
    adapter_x: Tensor | None,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    settings: FFNSettings,
) -> Callable | None:
    """What runs inputs of the shape of x (..., K) without autograd and dropout, checked here once;
    None if C++ does not take them."""
    if not _takes_few(*_rows_of(x, adapter_x), ffn, adapter):
        return None

    def step(x: Tensor, adapter_x: Tensor | None) -> Tensor:
        y, _ = _few_forward(*_rows_of(x, adapter_x), ffn, adapter, settings, False)
        return y.view(*x.shape[:-1], y.shape[1])

    return step


def _rows_of(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """Each as a matrix of its last dimension."""
    return (None if t is None else t.reshape(-1, t.shape[-1]) for t in tensors)


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
        product(dy, packed.packed_out[:, : width + rank], both)
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
            product(drop(dy, *output_drop), weights.out_weight, da)
        p, seed = inner_drop
        gate, da = {}, d_pre[:, :width]
        if weights.gate_weight is not None:
            gate, da = dict(linear=pre[:, width : 2 * width], dt=da), d_pre[:, width : 2 * width]
        activation_backward(
            settings.ffn_activation, da, pre[:, :width], **gate, p=p, seed=seed, covered=covered
        )
        grads[0] = stacked_input_gradient(d_pre, weights, packed.packed, separate)
    return tuple(grads)
