"""LoRA linear and adapter on library GEMMs: the *accumulate* plan.

Shapes and maths are those of ``reference.low_rank``.
Traffic  P = one read or write of an M x K (or M x N) activation; the frozen GEMM's own 2 P each way
         are in the sums.
         LoRA forward    x for S, y read and written by the accumulating GEMM:            5 P
         LoRA backward   dy for dS, dy for dB, x for dA, dx read and written again:       7 P
         adapter forward x for T, base, y written, read and written again:               5 P
         adapter backw.  dy for dH, dU and du, x for dD, dx written; sequential: dy again 5-6 P
Flops    LoRA 2MR(K + N) forward, 4MR(K + N) backward beside 2MNK each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.reference import low_rank as reference
from pelt_fast.reference.low_rank import LAYER_NORM_EPS, empty_like_nothing

from .activations import activate, activation_backward
from .blocks import (
    bottleneck_factor,
    drop_,
    drop_factor,
    row_blocks,
    scaled_by_,
    weight_gradient,
)


def _dropped_rank(x: Tensor, a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """S = drop(x) aᵀ with one read of x and no masked copy of it."""
    if seed is None:
        return x @ a.t()
    s = x.new_empty(x.shape[0], a.shape[0])
    for rows in row_blocks(x):
        factor = drop_factor(rows, x.shape[1], p, seed, x.dtype)
        torch.mm(factor.mul_(x[rows]), a.t(), out=s[rows])
    return s


def lora_forward(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
    s = _dropped_rank(x, lora_a.to(x.dtype), dropout_p, seed)
    y = F.linear(x, weight, bias)
    y.addmm_(s, lora_b.to(x.dtype).t(), alpha=scale)
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
    dx, da, db = (empty_like_nothing(dy) for _ in range(3))
    if needs[2]:
        db = weight_gradient(dy, s, lora_b.dtype).mul_(scale)
    if not (needs[0] or needs[1]):
        return dx, da, db
    ds = (dy @ lora_b.to(dy.dtype)).mul_(scale)
    if needs[0]:
        dx = dy @ weight
    if seed is not None:
        da = _masked_backward(dx, ds, x, lora_a, dropout_p, seed, needs)
    else:
        if needs[0]:
            dx.addmm_(ds, lora_a.to(dy.dtype))
        if needs[1]:
            da = weight_gradient(ds, x, lora_a.dtype)
    return dx, da, db


def _masked_backward(dx, ds, x, lora_a, p, seed, needs):
    """dx += drop(dS A) in place and dA = dSᵀ drop(x), each mask computed once for both."""
    a = lora_a.to(ds.dtype)
    wide = torch.promote_types(ds.dtype, lora_a.dtype)
    da = torch.zeros_like(lora_a, dtype=wide) if needs[1] else empty_like_nothing(ds)
    for rows in row_blocks(ds, a.shape[1]):
        factor = drop_factor(rows, a.shape[1], p, seed, ds.dtype)
        if needs[0]:
            dx[rows].addcmul_(ds[rows] @ a, factor)
        if needs[1]:
            da.addmm_(ds[rows].t().to(wide), factor.mul_(x[rows]).to(wide))
    return da.to(lora_a.dtype) if needs[1] else da


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
    low = x.dtype
    small = down_weight.to(low), None if down_bias is None else down_bias.to(low)
    if layer_norm == "in":
        t = x.new_empty(x.shape[0], down_weight.shape[0])
        for rows in row_blocks(x):  # what the norm gives is read while it is in cache
            u = F.layer_norm(x[rows], x.shape[1:], norm_weight, norm_bias, LAYER_NORM_EPS)
            t[rows] = F.linear(u, *small)
    else:
        t = F.linear(x, *small)
    h = drop_(activate(activation, t), dropout_p, seed)
    t = t if keep_t else empty_like_nothing(t)
    up = up_weight.to(low).t()
    if up_bias is None:
        return torch.addmm(residual, h, up, alpha=scale), t
    # the bias rides on the copy of base that the accumulating GEMM needs anyway
    out = torch.add(residual, up_bias.to(low), alpha=scale)
    return out.addmm_(h, up, alpha=scale), t


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

    need_dt = needs[0] or needs[1] or needs[2]
    dt, d_up, d_up_bias = up_gradients(
        dy, t, up_weight, scale=scale, activation=activation, dropout_p=dropout_p, seed=seed,
        need_dt=need_dt, need_db=needs[3], need_bias=needs[4],
    )  # fmt: skip
    grads[3:5] = [old if new is None else new for old, new in zip(grads[3:5], (d_up, d_up_bias))]
    if needs[1]:
        grads[1] = weight_gradient(dt, x, down_weight.dtype)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[0]:
        down = down_weight.to(dy.dtype)
        grads[0] = torch.addmm(dy, dt, down) if sequential else dt @ down
    return tuple(grads)


def up_gradients(
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
    dt = d_up = d_up_bias = None
    factor = bottleneck_factor(t, dropout_p, seed)
    if need_db:
        h = scaled_by_(activate(activation, t), factor)
        d_up = weight_gradient(dy, h, up_weight.dtype).mul_(scale)
    if need_bias:
        d_up_bias = dy.sum(0, dtype=up_weight.dtype).mul_(scale)
    if need_dt:
        dt = scaled_by_((dy @ up_weight.to(dy.dtype)).mul_(scale), factor)
        dt = activation_backward(activation, dt, t)
    return dt, d_up, d_up_bias
