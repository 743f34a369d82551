"""T[r] = drop_g(x[r]) D_gᵀ + d_g for a row r of method g, and its backward: one read of x each.

Shapes   x (M, K); the D_g (R_g, K) below each other (sum R_g, K), the d_g behind each other
         (sum R_g); T (M, R_max), of which only [r, :R_g] is written; rows by method of ``routed``.
         The weights may be fp32 beside a bf16 or fp16 x: they are rounded to x's dtype as loaded.
Maths    forward   a tile of rows of one method is one tile of ``rank_down``
         backward  dD_g = dTᵀ drop_g(x), dd_g = Σ dT, over the rows of g: parts of at most J-th of
                   the rows, each of one method, summed in their order. d_bias is a separate sum, as
                   in ``rank_down``
         Programs of ranks beyond R_g exit. dx is ``routed_up``'s kernel.
Traffic  forward   reads M K + K R_g of the methods that have rows, writes M R_g (split over K:
                   2 J M R_g fp32 more, J parts)
         backward  reads M K + M R_g, writes K sum R_g (2 (J + G) K R_g fp32 more, of the parts with
                   rows); d_bias reads M R_g once more
Flops    2 K R_g a row each. Above one rank block x is read again for each, from the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import dot, keep_tile
from pelt_fast.kernels.config import cdiv, padded, pick, split
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.routed import (
    BLOCK_METHODS,
    Rows,
    masks,
    rank_of,
    routed_reduce,
    routed_reduce_rows,
    tile_of,
)
from pelt_fast.ops.common.bundles import RoutedDown, RoutedDropout


@launched
@triton.jit
def routed_down_fwd_kernel(
    x_ptr,
    d_ptr,
    bias_ptr,
    t_ptr,
    order_ptr,
    starts_ptr,
    methods_ptr,
    seeds_ptr,
    thresholds_ptr,
    kept_ptr,
    M,
    K,
    R,
    G,
    part_k,
    stride_xm,
    stride_dr,
    stride_tm,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    R_ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program owns a tile of T of one method, or of one part of it when the loop over K is split
    tiles_r = tl.cdiv(R, BLOCK_R)
    g, first, start, count = tile_of(starts_ptr, tl.program_id(0) // tiles_r, BLOCK_M, G, BLOCK_G)
    rank = rank_of(methods_ptr, g, R_ALIGNED)
    first_r = (tl.program_id(0) % tiles_r) * BLOCK_R
    if (g >= G) | (first_r >= rank):
        return
    own = first + tl.arange(0, BLOCK_M)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    below = (tl.load(methods_ptr + 2 * g + 1) + offs_r).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = (own < count)[:, None], (offs_r < rank)[:, None]
    rows = tl.load(order_ptr + start + own, mask=own < count, other=0).to(tl.int64)[:, None]
    x_place = x_ptr + rows * stride_xm + offs_k[None, :]
    d_place = d_ptr + below[:, None] * stride_dr + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    last = tl.minimum(K, (part + 1) * part_k).to(tl.int32)
    for k in range((part * part_k).to(tl.int32), last, BLOCK_K):
        mask_k = (k + offs_k)[None, :] < K
        x = tl.load(x_place + k, mask=mask_m & mask_k, other=0.0)  # [BLOCK_M, BLOCK_K]
        d = tl.load(d_place + k, mask=mask_r & mask_k, other=0.0)  # [BLOCK_R, BLOCK_K]
        if DROP:
            threshold = tl.load(thresholds_ptr + g)
            keep = keep_tile(seeds_ptr + 2 * g, own.to(tl.int64), k, K, threshold, ALIGNED, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        acc = dot(x, tl.trans(d.to(x.dtype)), acc)
    if DROP:
        acc *= tl.load(kept_ptr + g)
    mask = mask_m & (offs_r < rank)[None, :]
    if SPLIT:
        place = t_ptr + (part * M + rows) * R + offs_r[None, :]
        tl.store(place, acc, mask=mask)
    else:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + below, mask=offs_r < rank, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        place = t_ptr + rows * stride_tm + offs_r[None, :]
        tl.store(place, acc.to(t_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit
def routed_down_bwd_kernel_dd(
    dt_ptr,
    x_ptr,
    dd_ptr,
    order_ptr,
    starts_ptr,
    methods_ptr,
    seeds_ptr,
    thresholds_ptr,
    kept_ptr,
    K,
    G,
    part_m,
    capacity,
    stride_dm,
    stride_xm,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    R_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program owns a tile of dD of one method for one part of its rows
    part = tl.program_id(2)
    g, first, start, count = tile_of(starts_ptr, part, part_m, G, BLOCK_G)
    rank = rank_of(methods_ptr, g, R_ALIGNED)
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (g >= G) | (tl.program_id(0) * BLOCK_R >= rank):
        return
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask_k, mask_r = (offs_k < K)[None, :], (offs_r < rank)[None, :]
    last = tl.minimum(count, first + part_m)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for m in range(first, last, BLOCK_M):
        own = m + tl.arange(0, BLOCK_M)
        mask_m = (own < last)[:, None]
        rows = tl.load(order_ptr + start + own, mask=own < last, other=0).to(tl.int64)[:, None]
        x_place = x_ptr + rows * stride_xm + offs_k[None, :]
        x = tl.load(x_place, mask=mask_m & mask_k, other=0.0)  # [BLOCK_M, BLOCK_K]
        dt_place = dt_ptr + rows * stride_dm + offs_r[None, :]
        dt = tl.load(dt_place, mask=mask_m & mask_r, other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROP:
            threshold = tl.load(thresholds_ptr + g)
            keep = keep_tile(
                seeds_ptr + 2 * g, own.to(tl.int64), first_k, K, threshold, ALIGNED, BLOCK_K
            )
            x = tl.where(keep, x, 0.0)
        acc = dot(tl.trans(x), dt, acc)
    if DROP:
        acc *= tl.load(kept_ptr + g)
    place = dd_ptr + part.to(tl.int64) * capacity + offs_r.to(tl.int64)[None, :] * K
    tl.store(place + offs_k[:, None], acc, mask=(offs_k < K)[:, None] & mask_r)


@launched
@triton.jit
def routed_sum_kernel(
    dt_ptr,
    out_ptr,
    order_ptr,
    starts_ptr,
    methods_ptr,
    R,
    G,
    part_m,
    stride_dm,
    R_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # the sum of one part of the rows of one method
    part = tl.program_id(0)
    g, first, start, count = tile_of(starts_ptr, part, part_m, G, BLOCK_G)
    rank = rank_of(methods_ptr, g, R_ALIGNED)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (g >= G) | (tl.program_id(1) * BLOCK_R >= rank):
        return
    last = tl.minimum(count, first + part_m)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for m in range(first, last, BLOCK_M):
        own = m + tl.arange(0, BLOCK_M)
        rows = tl.load(order_ptr + start + own, mask=own < last, other=0).to(tl.int64)[:, None]
        dt_place = dt_ptr + rows * stride_dm + offs_r[None, :]
        dt = tl.load(dt_place, mask=(own < last)[:, None] & (offs_r < rank)[None, :], other=0.0)
        total += tl.sum(dt.to(tl.float32), 0)
    tl.store(out_ptr + part.to(tl.int64) * R + offs_r, total, mask=offs_r < rank)


def routed_down(x: Tensor, down: RoutedDown, rows: Rows, drop: RoutedDropout) -> Tensor:
    """Return T (M, R_max) in x's dtype; [r, :R_g] of the rows that have a method are written."""
    (M, K), R, (weights, biases) = x.shape, max(rows.ranks), down
    t = x.new_empty(M, R)
    tile = pick("routed_down", 8 * x.element_size(), R, x.device)
    block_r = min(padded(R), tile.block_r)
    programs = cdiv(M, tile.block_m) * cdiv(R, block_r)
    part_blocks, parts = split(programs, cdiv(K, tile.block_k), x.device, tile.programs)
    out = t if parts == 1 else x.new_empty(parts, M, R, dtype=torch.float32)
    tables = masks(drop)
    routed_down_fwd_kernel[(rows.tiles(tile.block_m) * cdiv(R, block_r), parts)](
        x, weights, biases, out, rows.order, rows.starts, rows.methods, *tables,
        M, K, R, len(rows.ranks), part_blocks * tile.block_k, x.stride(0), weights.stride(0), R,
        HAS_BIAS=biases is not None, DROP=drop.seeds is not None, ALIGNED=K % 8 == 0,
        R_ALIGNED=rows.aligned, SPLIT=parts > 1, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k,
        BLOCK_R=block_r, BLOCK_G=BLOCK_METHODS, **tile.launch,
    )  # fmt: skip
    if parts > 1:
        routed_reduce_rows(out, t, rows, bias=biases)
    return t


def routed_down_bwd(
    dt: Tensor, x: Tensor, dtype: torch.dtype, rows: Rows, drop: RoutedDropout
) -> Tensor:
    """Return the dD_g (sum R_g, K) below each other in ``dtype``."""
    (M, K), R, total = x.shape, dt.shape[1], sum(rows.ranks)
    tile = pick("routed_down_bwd", 8 * x.element_size(), R, x.device)
    block_r = min(padded(R), tile.block_r)
    blocks = cdiv(K, tile.block_k), cdiv(R, block_r)
    part_blocks, _ = split(blocks[0] * blocks[1], cdiv(M, tile.block_m), x.device, tile.programs)
    part_m = part_blocks * tile.block_m
    parts = x.new_empty(rows.tiles(part_m), R, K, dtype=torch.float32)
    tables = masks(drop)
    routed_down_bwd_kernel_dd[(blocks[1], blocks[0], parts.shape[0])](
        dt, x, parts, rows.order, rows.starts, rows.methods, *tables,
        K, len(rows.ranks), part_m, R * K, dt.stride(0), x.stride(0),
        DROP=drop.seeds is not None, ALIGNED=K % 8 == 0, R_ALIGNED=rows.aligned,
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=block_r, BLOCK_G=BLOCK_METHODS,
        **tile.launch,
    )  # fmt: skip
    dd = x.new_empty(total, K, dtype=dtype)
    routed_reduce(parts, dd, rows, part_m, K)
    return dd


def routed_bias(dt: Tensor, dtype: torch.dtype, rows: Rows) -> Tensor:
    """Return the dd_g (sum R_g) behind each other in ``dtype``."""
    (M, R), total = dt.shape, sum(rows.ranks)
    block_r = min(padded(R), 64)
    part_blocks, _ = split(cdiv(R, block_r), cdiv(M, 64), dt.device)
    part_m = part_blocks * 64
    parts = dt.new_empty(rows.tiles(part_m), R, dtype=torch.float32)
    routed_sum_kernel[(parts.shape[0], cdiv(R, block_r))](
        dt, parts, rows.order, rows.starts, rows.methods, R, len(rows.ranks), part_m, dt.stride(0),
        R_ALIGNED=rows.aligned, BLOCK_M=64, BLOCK_R=block_r, BLOCK_G=BLOCK_METHODS, num_warps=4,
    )  # fmt: skip
    d_bias = dt.new_empty(total, dtype=dtype)
    routed_reduce(parts, d_bias, rows, part_m, 1)
    return d_bias
