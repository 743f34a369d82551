"""y[r] = base[r] + s_g (drop_g(f(T[r])) U_gᵀ + u_g) for a row r of method g, and its backward.

Shapes   T (M, R_max), read at [r, :R_g]; the U_g (N, R_g), each flattened, behind each other; the
         u_g (G, N); base and y (M, N); rows by method of ``routed``. A row of none: y = base.
         The weights may be fp32 beside a bf16 or fp16 y: they are rounded to y's dtype as loaded.
         dx = base + drop_g(dT D_g) is the same kernel, on the D_g below each other (sum R_g, N).
Maths    forward   a tile of rows of one method is one tile of ``rank_up``; its loop ends at R_g
         backward  dT = s_g drop_g(dy U_g) f'(T),  dU_g = s_g dyᵀ H,  du_g = s_g Σ dy: parts of the
                   rows of one method each, blocks of ranks beyond R_g exit
Traffic  forward   reads M N + (M + N) R_g, writes M N; each block of n reads T once more
         backward  reads dy once: M N + (M + N) R_g; workspace 4 (I M + (J + G) N) R_g bytes,
                   written and read, for I = N / BLOCK_N column parts and the parts that have rows,
                   at most J + G
Flops    2 N R_g a row forward, 4 N R_g backward. Above one rank block dy is read again for each,
         from the L2 cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import bottleneck, dot, keep_tile
from pelt_fast.kernels.config import cdiv, padded, pick, split
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.routed import (
    BLOCK_METHODS,
    Rows,
    masks,
    routed_reduce,
    routed_reduce_rows,
    scales_on,
    tile_of,
)
from pelt_fast.ops.common.bundles import RoutedDropout, RoutedTransform, RoutedUp


@launched
@triton.jit
def routed_up_fwd_kernel(
    t_ptr,
    w_ptr,
    bias_ptr,
    base_ptr,
    y_ptr,
    order_ptr,
    starts_ptr,
    methods_ptr,
    scales_ptr,
    seeds_ptr,
    thresholds_ptr,
    kept_ptr,
    N,
    G,
    stride_tm,
    stride_base,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOWN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP_H: tl.constexpr,
    DROP_UPDATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    H_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program owns a tile of y, of rows of one method or of none, whose rank is 0
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    g, first, start, count = tile_of(starts_ptr, tile, BLOCK_M, G + 1, BLOCK_G)
    if g > G:
        return
    own = first + tl.arange(0, BLOCK_M)
    first_n = (tl.program_id(0) % tiles_n) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (own < count)[:, None], (offs_n < N)[None, :]
    rows = tl.load(order_ptr + start + own, mask=own < count, other=0).to(tl.int64)[:, None]
    rank, above = tl.load(methods_ptr + 2 * g), tl.load(methods_ptr + 2 * g + 1)
    if H_ALIGNED:
        rank, above = tl.multiple_of(rank, 8), tl.multiple_of(above, 8)
    w_place = w_ptr + above.to(tl.int64) * N
    seed_ptr = seeds_ptr
    if DROP_H or DROP_UPDATE:
        seed_ptr += 2 * tl.minimum(g, G - 1)
        threshold, kept = tl.load(thresholds_ptr + g), tl.load(kept_ptr + g)
    else:
        threshold, kept = 0, 1.0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, rank, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rank
        t = tl.load(
            t_ptr + rows * stride_tm + offs_r[None, :], mask=mask_m & mask_r[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_R]
        if DOWN:
            place = w_place + offs_r.to(tl.int64)[:, None] * N + offs_n[None, :]
        else:
            place = w_place + offs_n.to(tl.int64)[None, :] * rank + offs_r[:, None]
        w = tl.load(place, mask=mask_n & mask_r[:, None], other=0.0)  # [BLOCK_R, BLOCK_N]
        h = t
        if ACTIVATION != "identity" or DROP_H:
            h = bottleneck(
                t.to(tl.float32), seed_ptr, own.to(tl.int64), r, rank, threshold, kept, ACTIVATION,
                DROP_H, H_ALIGNED, BLOCK_R,
            ).to(t.dtype)  # fmt: skip
        acc = dot(h, w.to(h.dtype), acc)
    if HAS_BIAS:
        bias = tl.load(
            bias_ptr + g.to(tl.int64) * N + offs_n, mask=(offs_n < N) & (g < G), other=0.0
        )
        acc += bias.to(tl.float32)[None, :]
    if HAS_SCALES:
        acc *= tl.load(scales_ptr + g)
    if DROP_UPDATE:
        keep = keep_tile(seed_ptr, own.to(tl.int64), first_n, N, threshold, ALIGNED, BLOCK_N)
        acc = tl.where(keep, acc * kept, 0.0)
    mask = mask_m & mask_n
    if HAS_BASE:
        place = base_ptr + rows * stride_base + offs_n[None, :]
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    place = y_ptr + rows * stride_ym + offs_n[None, :]
    tl.store(place, acc.to(y_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit
def routed_up_bwd_kernel(
    dy_ptr,
    t_ptr,
    u_ptr,
    dt_ptr,
    du_ptr,
    d_bias_ptr,
    order_ptr,
    starts_ptr,
    methods_ptr,
    seeds_ptr,
    thresholds_ptr,
    kept_ptr,
    one,
    M,
    N,
    R,
    G,
    part_m,
    capacity,
    stride_dm,
    stride_tm,
    NEED_DT: tl.constexpr,
    NEED_DU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # one program loops over one part of the rows of one method in one block of columns. It reads
    # each tile of dy once and adds to dt (a part for every block of columns) and du (one of these
    # rows)
    part = tl.program_id(1)
    g, first, start, count = tile_of(starts_ptr, part, part_m, G, BLOCK_G)
    tiles_r = tl.cdiv(R, BLOCK_R)
    column = (tl.program_id(0) // tiles_r).to(tl.int64)
    first_r = (tl.program_id(0) % tiles_r) * BLOCK_R
    rank, above = tl.load(methods_ptr + 2 * g), tl.load(methods_ptr + 2 * g + 1)
    if (g >= G) | (first_r >= rank):
        return
    if ALIGNED:
        rank, above = tl.multiple_of(rank, 8), tl.multiple_of(above, 8)
    offs_n = (tl.program_id(0) // tiles_r) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    mask_n, mask_r = (offs_n < N)[None, :], (offs_r < rank)[None, :]
    last = tl.minimum(count, first + part_m)
    element = offs_n.to(tl.int64)[:, None] * rank + offs_r[None, :]  # of U_g
    mask_u = (offs_n < N)[:, None] & mask_r
    if NEED_DT:
        u_place = u_ptr + above.to(tl.int64) * N + element
        u = tl.load(u_place, mask=mask_u, other=0.0).to(dy_ptr.dtype.element_ty)
    if DROP:
        threshold, kept = tl.load(thresholds_ptr + g), tl.load(kept_ptr + g)
        seed_ptr = seeds_ptr + 2 * g
    else:
        threshold, kept, seed_ptr = 0, 1.0, seeds_ptr
    du = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(first, last, BLOCK_M):
        own = m + tl.arange(0, BLOCK_M)
        mask_m = (own < last)[:, None]
        rows = tl.load(order_ptr + start + own, mask=own < last, other=0).to(tl.int64)[:, None]
        dy_place = dy_ptr + rows * stride_dm + offs_n[None, :]
        dy = tl.load(dy_place, mask=mask_m & mask_n, other=0.0)  # [BLOCK_M, BLOCK_N]
        if NEED_DT:
            dt = dot(dy, u, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            dt_place = dt_ptr + (column * M + rows) * R + offs_r[None, :]
            tl.store(dt_place, dt, mask=mask_m & mask_r)
        if NEED_DU:
            t_place = t_ptr + rows * stride_tm + offs_r[None, :]
            h = tl.load(t_place, mask=mask_m & mask_r, other=0.0)  # [BLOCK_M, BLOCK_R]
            if ACTIVATION != "identity" or DROP:
                h = bottleneck(
                    h.to(tl.float32), seed_ptr, own.to(tl.int64), first_r, rank, threshold, kept,
                    ACTIVATION, DROP, ALIGNED, BLOCK_R,
                )  # fmt: skip
            elif HAS_BIAS:
                # through registers, as in ``rank_up``: dy is summed too, and Triton 3.6 would copy
                # the next tile over data that wgmma still reads (docs/facts.md)
                h = h.to(tl.float32) * one
            du = dot(tl.trans(dy), h.to(dy.dtype), du)
        if HAS_BIAS:
            total += tl.sum(dy.to(tl.float32), 0)
    if NEED_DU:
        tl.store(du_ptr + part.to(tl.int64) * capacity + element, du, mask=mask_u)
    if HAS_BIAS:
        place = d_bias_ptr + part.to(tl.int64) * N + offs_n
        tl.store(place, total, mask=(offs_n < N) & (first_r == 0))


def routed_up(
    base: Tensor,
    t: Tensor,
    up: RoutedUp,
    rows: Rows,
    transform: RoutedTransform,
    drop: RoutedDropout,
) -> Tensor:
    """Return y (M, N), a new tensor."""
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    _update(y, base, t, up, rows, transform, drop, down=False)
    return y


def routed_input_gradient(
    dt: Tensor, base: Tensor | None, down_weights: Tensor, rows: Rows, drop: RoutedDropout
) -> Tensor:
    """Return dx (M, K) = base + drop_g(dT D_g), and base (zeros without one) on a row of none."""
    dx = dt.new_empty(dt.shape[0], down_weights.shape[1])
    factors = RoutedUp(down_weights, None)
    _update(dx, base, dt, factors, rows, RoutedTransform("identity", ()), drop, down=True)
    return dx


def _update(
    y: Tensor,
    base: Tensor | None,
    t: Tensor,
    factors: RoutedUp,
    rows: Rows,
    transform: RoutedTransform,
    drop: RoutedDropout,
    *,
    down: bool,
) -> None:
    N, R, (weights, biases) = y.shape[1], t.shape[1], factors
    if y.numel() == 0:
        return
    tile = pick("routed_up", 8 * y.element_size(), R, y.device)
    grid = ((rows.tiles(tile.block_m) + 1) * cdiv(N, tile.block_n),)
    scales = scales_on(y.device, transform.scales) if transform.scales else None
    has_drop = drop.seeds is not None
    routed_up_fwd_kernel[grid](
        t, weights, biases, base, y, rows.order, rows.starts, rows.methods, scales, *masks(drop),
        N, len(rows.ranks), t.stride(0), 0 if base is None else base.stride(0), y.stride(0),
        HAS_BIAS=biases is not None, HAS_BASE=base is not None, HAS_SCALES=scales is not None,
        DOWN=down, ACTIVATION=transform.activation, DROP_H=has_drop and not down,
        DROP_UPDATE=has_drop and down, ALIGNED=N % 8 == 0, H_ALIGNED=rows.aligned,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=min(padded(R), tile.block_r),
        BLOCK_G=BLOCK_METHODS, **tile.launch,
    )  # fmt: skip


def routed_up_bwd(
    dy: Tensor,
    t: Tensor,
    up_weights: Tensor,
    rows: Rows,
    transform: RoutedTransform,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dT (M, R_max) in dy's dtype, the dU_g flattened and the du_g (G, N) in up_weights',
    from one read of dy; None for what is not needed."""
    need_dt, need_du, need_bias = needs
    (M, N), R, count = dy.shape, t.shape[1], len(rows.ranks)
    tile = pick("routed_up_bwd", 8 * dy.element_size(), R, dy.device)
    block_r = min(padded(R), tile.block_r)
    columns = cdiv(N, tile.block_n)
    programs = columns * cdiv(R, block_r)
    part_blocks, _ = split(programs, cdiv(M, tile.block_m), dy.device, tile.programs)
    part_m = part_blocks * tile.block_m
    parts = rows.tiles(part_m)

    def workspace(*shape: int, needed: bool) -> Tensor | None:
        return dy.new_empty(shape, dtype=torch.float32) if needed else None

    dt_parts = workspace(columns, M, R, needed=need_dt)
    du_parts = workspace(parts, N * R, needed=need_du)
    bias_parts = workspace(parts, N, needed=need_bias)
    scales = scales_on(dy.device, transform.scales)
    routed_up_bwd_kernel[(programs, parts)](
        dy, t, up_weights, dt_parts, du_parts, bias_parts, rows.order, rows.starts, rows.methods,
        *masks(drop), 1.0, M, N, R, count, part_m, N * R, dy.stride(0), t.stride(0),
        NEED_DT=need_dt, NEED_DU=need_du, HAS_BIAS=need_bias, ACTIVATION=transform.activation,
        DROP=drop.seeds is not None, ALIGNED=rows.aligned, BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n, BLOCK_R=block_r, BLOCK_G=BLOCK_METHODS, **tile.launch,
    )  # fmt: skip
    dt = du = d_biases = None
    if dt_parts is not None:
        dt = dy.new_empty(M, R)
        kind = dict(activation=transform.activation, scales=scales, drop=drop)
        routed_reduce_rows(dt_parts, dt, rows, t=t, **kind)
    if du_parts is not None:
        du = dy.new_empty(up_weights.shape, dtype=up_weights.dtype)
        routed_reduce(du_parts, du, rows, part_m, N, scales=scales)
    if bias_parts is not None:
        d_biases = dy.new_empty(count, N, dtype=up_weights.dtype)
        routed_reduce(bias_parts, d_biases, rows, part_m, N, scales=scales, each=True)
    return dt, du, d_biases
