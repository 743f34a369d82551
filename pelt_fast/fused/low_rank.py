"""LoRA linear and adapter: the frozen GEMM is the library's, the rank update Triton's.

Shapes and maths are those of ``reference.low_rank``.
Traffic  P = one read or write of an M x K (or M x N) activation; the frozen GEMM's own 2 P each way
         are in the sums. Workspaces are those of the kernels.
         LoRA forward    x for S, y read and written by rank_up:                         5 P
         LoRA backward   dy for dS and dB together, x for dA, dx read and written:       6 P
         adapter forward x, base, y, in one kernel (LayerNorm in: x again from the L2): 3 P
         adapter backw.  dy for dT, dU and du together, x for dD, dx written; sequential: dy again
                         3-4 P; LayerNorm in: x again for dx, and its rows for their moments 4-6 P
         With dropout the mask is made once in backward, as bits: P / 16 to write, twice to read.
Where ``config.LORA_PLANS`` has a tail plan, LoRA's rank update rides on our own GEMM: 2 P less each
way. A LayerNorm on the update runs ``plans``. Above the ranks of ``config.FUSED_RANK`` the product
is large enough for the library's GEMM, but for one that reads a LayerNorm: that stays ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.kernels.adapter import adapter
from pelt_fast.kernels.config import FUSED_RANK, lora_plan, one_pass_kernel, processors
from pelt_fast.kernels.mask import mask_bits
from pelt_fast.kernels.norm import moments, norm_bwd, norm_gradients
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.tail_gemm import tail_gemm
from pelt_fast.ops import native_cuda
from pelt_fast.plans import low_rank as plans
from pelt_fast.plans.blocks import weight_gradient
from pelt_fast.reference.low_rank import empty_like_nothing

from . import cuda

ROWS_A_PROCESSOR = 32


def lora_forward(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
    rank = lora_a.shape[0]
    if seed is None and rank > FUSED_RANK["rank_down"]:
        s = x @ lora_a.to(x.dtype).t()
    else:
        s, _ = rank_down(x, lora_a, dropout_p=dropout_p, seed=seed)
    plan = tail_plan(x, weight, rank)
    if plan == "tail_cuda":
        return cuda.tail_gemm(x, weight, s, lora_b, scale=scale, bias=bias), s
    if plan != "accumulate":
        descriptors = plan == "tail_descriptor"
        tail = dict(scale=scale, bias=bias, descriptors=descriptors)
        return tail_gemm(x, weight.t(), s, lora_b.t(), **tail), s
    y = F.linear(x, weight, bias)
    if rank > FUSED_RANK["rank_up"]:
        y.addmm_(s, lora_b.to(y.dtype).t(), alpha=scale)
    else:
        rank_up(s, lora_b, y, scale=scale, out=y)
    return y, s


def tail_plan(x: Tensor, weight: Tensor, rank: int) -> str:
    """The plan of the table, where its kernel takes the input."""
    plan = lora_plan(rank, x.device)
    if plan == "tail_cuda" and not native_cuda.covers_tail(x, weight, rank):
        return "accumulate"
    return plan


def one_pass_by_cuda(dy: Tensor, rank: int) -> bool:
    """Whether the table's kernel for dS and dB is the CUDA C++ one, and it takes the input."""
    return one_pass_kernel(dy.device) == "cuda" and native_cuda.covers_one_pass(dy, rank)


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
    rank, need_ds = lora_a.shape[0], needs[0] or needs[1]
    if rank > FUSED_RANK["rank_up_bwd"]:
        if needs[2]:
            db = weight_gradient(dy, s, lora_b.dtype).mul_(scale)
        ds = (dy @ lora_b.to(dy.dtype)).mul_(scale) if need_ds else None
    elif need_ds and needs[2] and one_pass_by_cuda(dy, rank):
        ds, db, _ = cuda.rank_up_gradients(dy, s, lora_b, scale=scale)
    elif need_ds or needs[2]:
        ds, d_b, _ = rank_up_bwd(dy, s, lora_b, scale=scale, need_dt=need_ds, need_db=needs[2])
        db = d_b if needs[2] else db
    plan, bits = tail_plan(dy, weight, rank), None
    needs_bits = needs[0] and (needs[1] or plan == "tail_cuda")
    if seed is not None and needs_bits and lora_a.shape[1] % 8 == 0:
        bits = mask_bits(seed, dropout_p, dy.shape[0], lora_a.shape[1])
    if needs[0] and plan == "tail_cuda":
        mask = dict(dropout_p=dropout_p, bits=bits)
        dx = cuda.tail_gemm(dy, weight, ds, lora_a, transposed=True, **mask)
    elif needs[0] and plan != "accumulate":
        mask = dict(dropout_p=dropout_p, seed=seed, bits=bits)
        dx = tail_gemm(dy, weight, ds, lora_a, descriptors=plan == "tail_descriptor", **mask)
    elif needs[0]:
        dx = dy @ weight
        if seed is None and rank > FUSED_RANK["rank_up"]:
            dx.addmm_(ds, lora_a.to(dy.dtype))
        else:
            mask = dict(update_dropout_p=dropout_p, seed=seed, bits=bits)
            rank_up(ds, lora_a.t(), dx, out=dx, **mask)
    if needs[1]:
        if seed is None and rank > FUSED_RANK["rank_down_bwd"]:
            da = weight_gradient(ds, x, lora_a.dtype)
        else:
            mask = dict(dropout_p=dropout_p, seed=seed, bits=bits)
            da, _ = rank_down_bwd(ds, x, lora_a.dtype, **mask)
    return dx, da, db


def fills_device(x: Tensor) -> bool:
    """Whether one program for each block of rows keeps the device busy; fewer rows are cut along
    K as well, in two kernels."""
    return x.shape[0] >= ROWS_A_PROCESSOR * processors(x.device)


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
    rank, normed = down_weight.shape[0], layer_norm == "in"
    if layer_norm == "out" or (rank > FUSED_RANK["adapter"] and not normed):
        return plans.adapter_forward(
            x, base, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
            layer_norm, activation, scale, dropout_p, seed, keep_t,
        )  # fmt: skip
    base = x if base is None else base
    if rank <= FUSED_RANK["adapter"] and fills_device(x):
        y, t = adapter(
            x, base, down_weight, down_bias, up_weight, up_bias,
            norm=(norm_weight, norm_bias) if normed else None, activation=activation,
            scale=scale, dropout_p=dropout_p, seed=seed, keep_t=keep_t,
        )  # fmt: skip
        return y, t if keep_t else empty_like_nothing(x)
    t, h = rank_down(
        x, down_weight, down_bias, activation=activation, h_dropout_p=dropout_p, h_seed=seed,
        norm=(moments(x), norm_weight, norm_bias) if normed else None,
    )  # fmt: skip
    y = rank_up(h, up_weight, base, scale=scale, bias=up_bias)
    return y, t if keep_t else empty_like_nothing(x)


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
    by_kernels = down_weight.shape[0] <= FUSED_RANK["rank_up_bwd"]
    if layer_norm == "out" or (layer_norm == "none" and not by_kernels):
        return plans.adapter_backward(
            dy, x, t, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
            layer_norm, activation, scale, dropout_p, seed, sequential, needs,
        )  # fmt: skip
    grads = [empty_like_nothing(dy) for _ in range(7)]
    need_dt = needs[0] or needs[1] or needs[2] or needs[5] or needs[6]
    bottleneck = dict(scale=scale, activation=activation, dropout_p=dropout_p, seed=seed)
    up_gradients = rank_up_bwd if by_kernels else plans.bottleneck_gradients
    dt, *found = up_gradients(
        dy, t, up_weight, need_dt=need_dt, need_db=needs[3], need_bias=needs[4], **bottleneck
    )
    found = dict(zip((3, 4), found))
    residual = dy if sequential else None
    if layer_norm == "in":
        norm = (norm_weight, norm_bias)
        if needs[0]:
            found[0], own = norm_bwd(dt, t, x, down_weight, down_bias, *norm, residual)
        if any((needs[1], needs[2], needs[5], needs[6])):
            own = own if needs[0] else moments(x)
            found |= zip((1, 2, 5, 6), norm_gradients(dt, x, own, down_weight, *norm))
    else:
        if needs[1]:
            found[1], found[2] = rank_down_bwd(dt, x, down_weight.dtype, with_bias=needs[2])
        elif needs[2]:
            found[2] = dt.sum(0, dtype=down_weight.dtype)
        if needs[0] and sequential:
            found[0] = rank_up(dt, down_weight.t(), dy)
        elif needs[0]:
            found[0] = torch.mm(dt, down_weight.to(dt.dtype))
    for i, grad in found.items():
        grads[i] = grad if needs[i] else grads[i]
    return tuple(grads)
