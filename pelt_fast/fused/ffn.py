"""Widened FFN: two library GEMMs and one two-segment kernel each way (identity I3).

Shapes and maths are those of ``reference.ffn``; P = one M x N pass, Q = one M x F pass.
Traffic  forward    [W1; D] is one GEMM that reads x once; one pass 2 Q makes A and H, at inference
                    in place; [W2 | s U] is one GEMM. With an output dropout: W2, then the rank
                    update rides on the pass over y that the dropout is (2 P).
         backward   output dropout of dy 2 P; dA and dH into the columns of d_pre (packed: one
                    GEMM); one pass 3 Q in place; one GEMM [dZ | dT] [W1; D] for dx.
         An adapter that reads a tensor of its own: W1 and D are two GEMMs each way; the rest holds.
Flops    (F + R) / F of the frozen FFN's, plus 2MR(K + N) for the two weight gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.kernels.config import FUSED_RANK
from pelt_fast.kernels.mask import dropout
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.widened_ffn import widened_act, widened_act_bwd
from pelt_fast.plans.blocks import weight_gradient
from pelt_fast.plans.ffn import (
    activation_buffer,
    input_gradient,
    packed_product,
    pre_activations,
    seed_row,
    summed_bias,
)
from pelt_fast.reference.low_rank import empty_like_nothing

PADDING = 16  # columns of the activation buffer: rows stay aligned for the tensor cores


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
    inner, rank, gated = in_weight.shape[0], down_weight.shape[0], gate_weight is not None
    act = activation_buffer(pre, inner, rank + -rank % PADDING, gated, keep_pre)
    widened_act(
        pre, act, inner, rank, gated=gated, ffn_activation=ffn_activation,
        activation=activation, dropout_p=dropout_p, activation_dropout_p=activation_dropout_p,
        seed_h=seed_row(seed, 0, dropout_p), seed_a=seed_row(seed, 1, activation_dropout_p),
    )  # fmt: skip
    output_seed = seed_row(seed, 2, output_dropout_p)
    pre = pre if keep_pre else empty_like_nothing(pre)
    if output_seed is None and packed_out is not None:
        return packed_product(act, packed_out, summed_bias(out_bias, up_bias, scale, x.dtype)), pre
    a, h = act[:, :inner], act[:, inner : inner + rank]
    if output_seed is None and rank > FUSED_RANK["rank_up"]:
        y = F.linear(a, out_weight, summed_bias(out_bias, up_bias, scale, x.dtype))
        return y.addmm_(h, up_weight.to(y.dtype).t(), alpha=scale), pre
    y = F.linear(a, out_weight, out_bias)
    rank_up(
        h, up_weight, y, scale=scale, bias=up_bias, out=y,
        base_dropout_p=output_dropout_p, seed=output_seed,
    )  # fmt: skip
    return y, pre


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
    rank, low, gated = down_weight.shape[0], dy.dtype, gate_weight is not None
    inner = in_weight.shape[0] if needs[0] else 0
    first = inner * (2 if gated else 1)
    if not needs[0] and pre.shape[1] != rank:
        start = in_weight.shape[0] * (2 if gated else 1)
        pre = pre[:, start : start + rank]
    need_dt = any(needs[:3]) or needs[5]
    d_pre = pre.new_empty(pre.shape) if need_dt else None
    t, dt = pre[:, first : first + rank], d_pre[:, first : first + rank] if need_dt else None
    seed_h, output_seed = seed_row(seed, 0, dropout_p), seed_row(seed, 2, output_dropout_p)
    by_kernel = rank <= FUSED_RANK["rank_up_bwd"]
    # dA and s dH from one GEMM
    in_one = needs[0] and packed_out is not None and output_seed is None and not by_kernel
    bottleneck = dict(activation=activation, scale=1.0 if in_one else scale, dropout_p=dropout_p)
    segments = dict(
        gated=gated and needs[0], ffn_activation=ffn_activation, seed_h=seed_h,
        activation_dropout_p=activation_dropout_p,
        seed_a=seed_row(seed, 1, activation_dropout_p) if needs[0] else None, **bottleneck,
    )  # fmt: skip
    if in_one:
        columns = d_pre[:, first - inner : first + rank]
        torch.mm(dy, packed_out[:, : inner + rank], out=columns)
    elif needs[0]:
        d_out = dropout(dy, output_dropout_p, output_seed)
        torch.mm(d_out, out_weight, out=d_pre[:, first - inner : first])
    if by_kernel:
        # one read of dy gives dT, dU and du; the bottleneck's columns are then done
        done = (
            rank_up_bwd(dy, t, up_weight, seed=seed_h, need_dt=need_dt, need_db=needs[3],
                        need_bias=needs[4], dt=dt, **bottleneck)
            if need_dt or needs[3] or needs[4] else (None, None, None)
        )  # fmt: skip
        grads[3], grads[4] = (g if d is None else d for g, d in zip(grads[3:], done[1:]))
        if needs[0]:
            widened_act_bwd(d_pre, pre, None, inner, rank, bottleneck_done=True, **segments)
    else:
        h = dy.new_empty(dy.shape[0], rank) if needs[3] else None
        if need_dt and not in_one:
            torch.mm(dy, up_weight.to(low), out=dt)
        if need_dt or needs[3]:
            widened_act_bwd(d_pre, pre, h, inner, rank, **segments)
        if needs[3]:
            grads[3] = weight_gradient(dy, h, up_weight.dtype).mul_(scale)
        if needs[4]:
            grads[4] = dy.sum(0, dtype=up_weight.dtype).mul_(scale)
    if needs[1]:
        grads[1] = weight_gradient(dt, x, down_weight.dtype)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[5]:
        grads[5] = dt @ down_weight.to(low)
    if needs[0]:
        down = None if separate else down_weight
        grads[0] = input_gradient(d_pre, in_weight, gate_weight, down, packed)
    return tuple(grads)
