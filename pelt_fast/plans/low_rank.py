"""LoRA linear and adapter on library GEMMs: the *accumulate* plan.

Shapes and maths are those of ``reference.low_rank``; the products with a small rank are
``plans.skinny``'s.
Traffic  P = one read or write of an M x K (or M x N) activation; the frozen GEMM's own 2 P each way
         are in the sums. In brackets: with the C++ ops.
         LoRA forward    x for S, y read and written for the update:                     5 P
         LoRA backward   dy for dS, dy for dB, x for dA, dx read and written again:       7 P (6)
         adapter forward x for T, base, y written, read and written again:             5 P (2-3)
         adapter backw.  dy for dH, dU and du, x for dD, dx written; sequential: dy again
                                                                                       5-6 P (3)
Flops    LoRA 2MR(K + N) forward, 4MR(K + N) backward beside 2MNK each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.reference import low_rank as reference
from pelt_fast.reference.low_rank import LAYER_NORM_EPS, empty_like_nothing

from . import one_pass
from .activations import activate, activation_backward
from .blocks import fill, row_blocks
from .skinny import down, down_gradients, up, up_gradients


def lora_forward(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
    s = down(x, lora_a, p=dropout_p, seed=seed)
    y = F.linear(x, weight, bias)
    return up(y, s, lora_b, scale=scale, in_place=True), s


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
    grads = [empty_like_nothing(dy) for _ in range(3)]
    need_ds = needs[0] or needs[1]
    ds, db, _ = up_gradients(
        dy, s if needs[2] else None, lora_b, scale, need_dh=need_ds, need_bias=False
    )
    fill(grads, [2], [db])
    if need_ds:
        dx = dy @ weight if needs[0] else None
        found = down_gradients(
            ds, x, lora_a, dx, p=dropout_p, seed=seed, need_dx=needs[0], need_da=needs[1],
            in_place=True,
        )  # fmt: skip
        fill(grads, [0, 1], found)
    return tuple(grads)


def adapter_forward(
    x,
    base,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    norm_weight,
    norm_bias,
    layer_norm,
    activation,
    scale,
    dropout_p,
    seed,
    keep_t,
):
    residual = x if base is None else base
    if layer_norm == "out" or (layer_norm == "in" and x.dtype != norm_weight.dtype):
        out = torch.empty_like(residual, memory_format=torch.contiguous_format)
        t = x.new_empty(x.shape[0], down_weight.shape[0]) if keep_t else empty_like_nothing(x)
        for rows in row_blocks(x):
            out[rows], kept = reference.adapter_forward(
                x[rows], residual[rows], down_weight, down_bias, up_weight, up_bias, norm_weight,
                norm_bias, layer_norm, activation, scale, dropout_p, seed, keep_t, rows.start,
            )  # fmt: skip
            if keep_t:
                t[rows] = kept
        return out, t
    rank = down_weight.shape[0]
    if layer_norm == "none" and one_pass.takes_forward(x, residual, rank):
        return one_pass.adapter_forward(
            x, residual, down_weight, down_bias, up_weight, up_bias, activation, scale, dropout_p,
            seed, keep_t,
        )  # fmt: skip
    if layer_norm == "in":
        small = down_weight.to(x.dtype), None if down_bias is None else down_bias.to(x.dtype)
        t = x.new_empty(x.shape[0], down_weight.shape[0])
        for rows in row_blocks(x):  # what the norm gives is read while it is in cache
            u = F.layer_norm(x[rows], x.shape[1:], norm_weight, norm_bias, LAYER_NORM_EPS)
            t[rows] = F.linear(u, *small)
    else:
        t = down(x, down_weight, down_bias)
    h = activate(activation, t, p=dropout_p, seed=seed)
    out = up(residual, h, up_weight, up_bias, scale)
    return out, t if keep_t else empty_like_nothing(t)


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
) -> tuple[Tensor, ...]:
    grads = [empty_like_nothing(dy) for _ in range(7)]
    if layer_norm != "none":
        small = (down_weight, down_weight[:, 0], up_weight, up_bias, norm_weight, norm_bias)
        if needs[0]:
            grads[0] = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i, like in enumerate(small, 1):
            if needs[i]:
                grads[i] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        for rows in row_blocks(x):
            block = reference.adapter_backward(
                dy[rows], x[rows], t[rows], down_weight, down_bias, up_weight, up_bias, norm_weight,
                norm_bias, layer_norm, activation, scale, dropout_p, seed, sequential, needs,
                rows.start,
            )  # fmt: skip
            if needs[0]:
                grads[0][rows] = block[0]
            for i in range(1, 7):
                if needs[i]:
                    grads[i] += block[i]
        return tuple(grads)

    if one_pass.takes_backward(dy, x, down_weight.shape[0]):
        found = one_pass.adapter_backward(
            dy, x, t, down_weight, up_weight, activation, scale, dropout_p, seed, sequential, needs
        )
        return *found, *grads[5:]
    need_dt = needs[0] or needs[1] or needs[2]
    dt, *found = bottleneck_gradients(
        dy, t, up_weight, scale=scale, activation=activation, dropout_p=dropout_p, seed=seed,
        need_dt=need_dt, need_db=needs[3], need_bias=needs[4],
    )  # fmt: skip
    fill(grads, [3, 4], found)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[0] or needs[1]:
        found = down_gradients(
            dt, x, down_weight, dy if sequential else None, need_dx=needs[0], need_da=needs[1]
        )
        fill(grads, [0, 1], found)
    return tuple(grads)


def bottleneck_gradients(
    dy: Tensor,
    t: Tensor,
    up_weight: Tensor,
    *,
    scale: float,
    activation: str,
    dropout_p: float,
    seed: Tensor | None,
    need_dt: bool,
    need_db: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dt (M, R) = s drop(dy U) f'(t), and the gradients of up_weight and up_bias; None for what is
    not needed."""
    h = activate(activation, t, p=dropout_p, seed=seed) if need_db else None
    dt, d_up, d_up_bias = up_gradients(
        dy, h, up_weight, scale, need_dh=need_dt, need_bias=need_bias
    )
    if need_dt:
        dt = activation_backward(activation, dt, t, p=dropout_p, seed=seed)
    return dt, d_up, d_up_bias
