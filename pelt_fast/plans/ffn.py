"""Widened FFN on library GEMMs (identity I3): packed when the stacked weights are at hand.

Shapes and maths are those of ``reference.ffn``; P = one M x N pass, Q = one M x F pass.
Traffic  forward    [W1; D] is one GEMM that reads x once; φ, its dropout; [W2 | s U] is one GEMM.
                    With an output dropout (the model's own): W2, then one pass over y drops and
                    adds s H Uᵀ + s u in row blocks. An adapter that reads a tensor of its own:
                    W1 and D are two GEMMs each way, each reads and writes its own; the rest holds.
         backward   dy for dT, dU and du, one GEMM [dZ | dT] [W1; D] for dx. dZ is made in
                    place of dA.
Flops    (F + R) / F of the frozen FFN's, plus 2MR(K + N) for the two weight gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.reference.low_rank import empty_like_nothing

from .activations import activate, activation_backward
from .blocks import drop, fill
from .skinny import down_gradients, up, up_gradients


def seed_row(seed: Tensor | None, row: int, p: float) -> Tensor | None:
    return None if seed is None or p == 0 else seed[row]


def _stacked_bias(parts: list[tuple[Tensor | None, int]], like: Tensor) -> Tensor | None:
    """The biases one under the other, zeros for the missing; None when all are missing."""
    if all(bias is None for bias, _ in parts):
        return None
    return torch.cat([like.new_zeros(n) if b is None else b.to(like.dtype) for b, n in parts])


def pre_activations(
    x, adapter_x, in_weight, in_bias, gate_weight, gate_bias, down_weight, down_bias, packed
) -> Tensor:
    inner, rank = in_weight.shape[0], down_weight.shape[0]
    stack = [(in_weight, in_bias), (down_weight, down_bias)]
    if gate_weight is not None:
        stack.insert(0, (gate_weight, gate_bias))
    if packed is not None:
        padding = packed.shape[0] - sum(weight.shape[0] for weight, _ in stack)
        parts = [(bias, weight.shape[0]) for weight, bias in stack] + [(None, padding)]
        return F.linear(x, packed, _stacked_bias(parts, x))
    pre = x.new_empty(x.shape[0], inner * (len(stack) - 1) + rank)
    inputs = [x] * (len(stack) - 1) + [x if adapter_x is None else adapter_x]
    first = 0
    for (weight, bias), source in zip(stack, inputs):
        part = pre[:, first : first + weight.shape[0]]
        if bias is None:
            torch.mm(source, weight.to(x.dtype).t(), out=part)
        else:
            torch.addmm(bias.to(x.dtype), source, weight.to(x.dtype).t(), out=part)
        first += weight.shape[0]
    return pre


def ffn_forward(
    x,
    adapter_x,
    in_weight,
    in_bias,
    gate_weight,
    gate_bias,
    out_weight,
    out_bias,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    packed,
    packed_out,
    ffn_activation,
    activation,
    scale,
    dropout_p,
    activation_dropout_p,
    output_dropout_p,
    seed,
    keep_pre,
):
    pre = pre_activations(
        x, adapter_x, in_weight, in_bias, gate_weight, gate_bias, down_weight, down_bias, packed
    )
    inner, rank = in_weight.shape[0], down_weight.shape[0]
    act = activation_buffer(pre, inner, rank, gate_weight is not None, keep_pre)
    first = 0 if gate_weight is None else inner
    a, h = act[:, :inner], act[:, inner : inner + rank]
    z = None if gate_weight is None else pre[:, inner : 2 * inner]
    inner_drop = dict(p=activation_dropout_p, seed=seed_row(seed, 1, activation_dropout_p))
    activate(ffn_activation, pre[:, :inner], a, linear=z, **inner_drop)
    t = pre[:, first + inner : first + inner + rank]
    activate(activation, t, h, p=dropout_p, seed=seed_row(seed, 0, dropout_p))
    output_drop = (output_dropout_p, seed_row(seed, 2, output_dropout_p))
    y = out_projection(
        act, inner, out_weight, out_bias, up_weight, up_bias, packed_out, scale, *output_drop
    )
    return y, pre if keep_pre else empty_like_nothing(pre)


def activation_buffer(pre: Tensor, inner: int, rank: int, gated: bool, keep_pre: bool) -> Tensor:
    """Where [A | H | padding] goes: over the pre-activations where nobody else will read them."""
    if not keep_pre:
        return pre[:, inner:] if gated else pre
    return pre.new_empty(pre.shape[0], inner + rank)


def summed_bias(out_bias: Tensor | None, up_bias: Tensor | None, scale: float, low: torch.dtype):
    """b2 + s u in ``low``; None when both are missing."""
    if up_bias is None:
        return out_bias
    bias = up_bias.to(low) * scale
    return bias if out_bias is None else bias + out_bias


def packed_product(act: Tensor, packed_out: Tensor, bias: Tensor | None) -> Tensor:
    """[A | H] [W2 | s U]ᵀ + bias; what either holds past F + R is zeros."""
    width = min(act.shape[1], packed_out.shape[1])
    return F.linear(act[:, :width], packed_out[:, :width], bias)


def out_projection(
    act, inner, out_weight, out_bias, up_weight, up_bias, packed_out, scale, p, seed
) -> Tensor:
    """drop(A W2ᵀ + b2) + s (H Uᵀ + u)."""
    low, rank = act.dtype, up_weight.shape[1]
    if seed is None and packed_out is not None:
        bias = summed_bias(out_bias, up_bias, scale, low)
        return packed_product(act[:, : inner + rank], packed_out, bias)
    a, h = act[:, :inner], act[:, inner : inner + rank]
    if seed is None:
        y = F.linear(a, out_weight, summed_bias(out_bias, up_bias, scale, low))
        return up(y, h, up_weight, scale=scale, in_place=True)
    y = F.linear(a, out_weight, out_bias)
    return up(y, h, up_weight, up_bias, scale, p=p, seed=seed, in_place=True)


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
) -> tuple[Tensor, ...]:
    grads = [empty_like_nothing(dy) for _ in range(6)]
    rank = down_weight.shape[0]
    inner = in_weight.shape[0] * (1 if gate_weight is None else 2)
    first = 0 if pre.shape[1] == rank else inner
    t = pre[:, first : first + rank]
    bottleneck = dict(p=dropout_p, seed=seed_row(seed, 0, dropout_p))
    h = activate(activation, t, **bottleneck) if needs[3] else None
    need_dt = any(needs[:3]) or needs[5]
    output_seed = seed_row(seed, 2, output_dropout_p)
    in_one = needs[0] and packed_out is not None and output_seed is None
    d_pre = dt = None
    if need_dt:
        d_pre = torch.empty_like(pre, memory_format=torch.contiguous_format)
        d_pre[:, first + rank :] = 0  # the padding of the packed rows
        dt = d_pre[:, first : first + rank]
    _, *found = up_gradients(
        dy, h, up_weight, scale, need_dh=need_dt and not in_one, need_bias=needs[4], dh=dt
    )
    fill(grads, [3, 4], found)
    if not need_dt:
        return tuple(grads)
    if in_one:
        start, width = first - in_weight.shape[0], in_weight.shape[0] + rank
        torch.mm(dy, packed_out[:, :width], out=d_pre[:, start : start + width])
    activation_backward(activation, dt, t, **bottleneck)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[1] or needs[5]:
        found = down_gradients(dt, x, down_weight, need_dx=needs[5], need_da=needs[1])
        fill(grads, [5, 1], found)
    if needs[0]:
        da = d_pre[:, inner - in_weight.shape[0] : inner]
        if not in_one:
            torch.mm(drop(dy, output_dropout_p, output_seed), out_weight, out=da)
        width = da.shape[1]
        gate = (
            {} if gate_weight is None
            else dict(linear=pre[:, width : 2 * width], dt=d_pre[:, :width])
        )  # fmt: skip
        inner_drop = dict(p=activation_dropout_p, seed=seed_row(seed, 1, activation_dropout_p))
        activation_backward(ffn_activation, da, pre[:, :width], **gate, **inner_drop)
        down = None if separate else down_weight
        grads[0] = input_gradient(d_pre, in_weight, gate_weight, down, packed)
    return tuple(grads)


def input_gradient(d_pre, in_weight, gate_weight, down_weight, packed) -> Tensor:
    """[dG | dZ | dT] times the stacked weights: one GEMM where they are packed. Without
    ``down_weight`` dT is no part of it."""
    if packed is not None and down_weight is not None:
        return d_pre @ packed
    stack = [in_weight] if gate_weight is None else [gate_weight, in_weight]
    stack = stack if down_weight is None else [*stack, down_weight.to(d_pre.dtype)]
    first = stack[0].shape[0]
    dx = d_pre[:, :first] @ stack[0]
    for weight in stack[1:]:
        dx.addmm_(d_pre[:, first : first + weight.shape[0]], weight)
        first += weight.shape[0]
    return dx
