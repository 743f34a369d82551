"""What the kernels of many methods in one batch share: rows by method, tiles of them, reductions.

Shapes   segments (S, 4) of M rows and the ranks R_g of G methods -> order (M), starts (G + 2).
         parts (J, M, R_max) -> T or dT (M, R_max); parts (J, sizes of one method) -> gradients.
Maths    order is the rows by method: those of method g are order[starts[g] : starts[g + 1]], in
         the order of the method's own rows, then the rows of none. A kernel's tile is rows of one
         method here, wherever they are in the batch: short segments share a read of the factors.
         There are at most M / BLOCK_M + min(G, S) + 1 tiles, known without the routes.
Traffic  rows      S (M + G) / BLOCK_M x 4 numbers, from the L2 cache; writes 4 (M + G) bytes
         reduced   as ``reduce``: reads the fp32 parts once, in fixed order; only those of methods
                   that have rows, only their own ranks
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import derivative, keep_tile
from pelt_fast.kernels.config import cdiv, padded
from pelt_fast.kernels.launch import launched
from pelt_fast.ops.common import dropout as philox
from pelt_fast.ops.common.bundles import RoutedDropout, Segments
from pelt_fast.ops.common.parts import constant, first_rows

BLOCK_METHODS = 64
BLOCK_SIZE = 1024


class Rows(NamedTuple):
    """The rows of a batch by method, on the device; ``most``: how many methods can have rows."""

    order: Tensor
    starts: Tensor
    methods: Tensor  # (G + 1, 2): rank and first row among the D_g below each other; 0, 0 of none
    ranks: Sequence[int]
    most: int

    @property
    def aligned(self) -> bool:
        """Whether 8 divides every rank."""
        return all(rank % 8 == 0 for rank in self.ranks)

    def tiles(self, size: int) -> int:
        """How many tiles of ``size`` rows of one method there can be, without those of none."""
        return cdiv(self.order.shape[0], size) + self.most


def masks(drop: RoutedDropout) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Seeds, thresholds and scales of kept elements, each with an entry for every method."""
    if drop.seeds is None:
        return None, None, None
    each, device = tuple(drop.probabilities), drop.seeds.device
    thresholds = constant((*map(philox.threshold, each), 0), torch.int32, device)
    kept = constant((*map(philox.keep_scale, each), 1.0), torch.float32, device)
    return drop.seeds.contiguous(), thresholds, kept


def scales_on(device: torch.device, scales: Sequence[float]) -> Tensor:
    """The scales of all methods, and 0 for the rows of none."""
    return constant((*scales, 0.0), torch.float32, device)


@triton.jit
def tile_of(starts_ptr, tile, size, zones, BLOCK_G: tl.constexpr):
    """Tile number ``tile`` when each of the first ``zones`` of ``starts`` is cut into tiles of
    ``size``: its zone (``zones``: there is no such tile), the number of its first row among
    the zone's own, the zone's start and its rows."""
    zone, passed, before = 0, 0, 0
    for g in range(0, zones, BLOCK_G):
        offs = g + tl.arange(0, BLOCK_G)
        inside = offs < zones
        start = tl.load(starts_ptr + offs, mask=inside, other=0)
        tiles = tl.cdiv(tl.load(starts_ptr + offs + 1, mask=inside, other=0) - start, size)
        behind = inside & (before + tl.cumsum(tiles, 0) <= tile)
        zone += tl.sum(behind.to(tl.int32), 0)
        passed += tl.sum(tl.where(behind, tiles, 0), 0)
        before += tl.sum(tiles, 0)
    start = tl.load(starts_ptr + zone)
    end = tl.load(starts_ptr + zone + 1, mask=zone < zones, other=0)
    return zone, (tile - passed) * size, start, end - start


@triton.jit
def rank_of(methods_ptr, g, ALIGNED: tl.constexpr):
    """The rank of a method. If 8 divides all of them, masks of ranks let loads be of 16 bytes."""
    rank = tl.load(methods_ptr + 2 * g)
    if ALIGNED:
        rank = tl.multiple_of(rank, 8)
    return rank


@launched
@triton.jit
def routed_rows_kernel(
    segments_ptr,
    methods_ptr,
    order_ptr,
    starts_ptr,
    S,
    G,
    M,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # a program places BLOCK_M rows, and counts the rows before as many methods. A row of none is
    # behind all others; how many are before it is known without the other programs
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    method = tl.full((BLOCK_M,), 0, tl.int32) + G
    own = tl.zeros((BLOCK_M,), tl.int32)
    above = tl.zeros((BLOCK_M,), tl.int32)  # rows of methods above it in the batch
    for s in range(0, S, BLOCK_S):
        offs = s + tl.arange(0, BLOCK_S)
        segment = segments_ptr + 4 * offs
        first = tl.load(segment, mask=offs < S, other=0).to(tl.int32)
        g = tl.load(segment + 2, mask=offs < S, other=-1).to(tl.int32)
        runs = (g >= 0) & (g < G)
        rank = tl.load(methods_ptr + 2 * g, mask=runs, other=0)
        rows = tl.load(segment + 1, mask=runs & (rank > 0), other=0).to(tl.int32)
        its_own = tl.load(segment + 3, mask=offs < S, other=0).to(tl.int32)
        past = place[:, None] - first[None, :]
        here = (past >= 0) & (past < rows[None, :])
        method += tl.sum(tl.where(here, g[None, :] - G, 0), 1)
        own += tl.sum(tl.where(here, its_own[None, :] + past, 0), 1)
        above += tl.sum(tl.minimum(tl.maximum(past, 0), rows[None, :]), 1)
    start = tl.zeros((BLOCK_M,), tl.int32)  # rows of lower methods than its own
    lower = tl.zeros((BLOCK_M,), tl.int32)  # rows of lower methods than the number ``place``
    for s in range(0, S, BLOCK_S):
        offs = s + tl.arange(0, BLOCK_S)
        segment = segments_ptr + 4 * offs
        g = tl.load(segment + 2, mask=offs < S, other=-1).to(tl.int32)
        runs = (g >= 0) & (g < G)
        rank = tl.load(methods_ptr + 2 * g, mask=runs, other=0)
        rows = tl.load(segment + 1, mask=runs & (rank > 0), other=0).to(tl.int32)
        start += tl.sum(tl.where(g[None, :] < method[:, None], rows[None, :], 0), 1)
        lower += tl.sum(tl.where(g[None, :] < place[:, None], rows[None, :], 0), 1)
    position = start + tl.where(method < G, own, place - above)
    tl.store(order_ptr + position, place, mask=place < M)
    tl.store(starts_ptr + place, tl.where(place > G, M, lower), mask=place < G + 2)


def routed_rows(where: Segments, rows: int) -> Rows:
    """The ``rows`` rows of a batch by method. Nothing is read from the device."""
    segments, ranks = where.segments.contiguous(), where.ranks
    count, device = len(ranks), segments.device
    pairs = (*zip(ranks, first_rows(ranks), strict=True), (0, 0))
    methods = constant(pairs, torch.int32, device)
    order = torch.empty(rows, dtype=torch.int32, device=device)
    starts = torch.empty(count + 2, dtype=torch.int32, device=device)
    routed_rows_kernel[(cdiv(max(rows, count + 2), 128),)](
        segments, methods, order, starts, segments.shape[0], count, rows, BLOCK_M=128, BLOCK_S=32,
        num_warps=4,
    )  # fmt: skip
    return Rows(order, starts, methods, ranks, min(count, segments.shape[0]))


@launched
@triton.jit
def routed_reduce_rows_kernel(
    parts_ptr,
    bias_ptr,
    t_ptr,
    out_ptr,
    order_ptr,
    starts_ptr,
    methods_ptr,
    scales_ptr,
    seeds_ptr,
    thresholds_ptr,
    kept_ptr,
    J,
    M,
    G,
    stride_p,
    stride_tm,
    stride_om,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # out = drop(s Σ_j parts[j]) f'(t) + bias of a tile of one method's rows
    g, first, start, count = tile_of(starts_ptr, tl.program_id(0), BLOCK_M, G, BLOCK_G)
    rank = rank_of(methods_ptr, g, ALIGNED)
    first_r = tl.program_id(1) * BLOCK_R
    if (g >= G) | (first_r >= rank):
        return
    own = first + tl.arange(0, BLOCK_M)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    rows = tl.load(order_ptr + start + own, mask=own < count, other=0).to(tl.int64)[:, None]
    mask = (own < count)[:, None] & (offs_r < rank)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    place = parts_ptr + rows * stride_p + offs_r[None, :]
    for _ in range(0, J):
        acc += tl.load(place, mask=mask, other=0.0)
        place += tl.cast(M, tl.int64) * stride_p
    if HAS_SCALES:
        acc *= tl.load(scales_ptr + g)
    if DROP:
        keep = keep_tile(
            seeds_ptr + 2 * g, own.to(tl.int64), first_r, rank, tl.load(thresholds_ptr + g),
            ALIGNED, BLOCK_R,
        )  # fmt: skip
        acc = tl.where(keep, acc * tl.load(kept_ptr + g), 0.0)
    if ACTIVATION != "identity":
        t = tl.load(t_ptr + rows * stride_tm + offs_r[None, :], mask=mask, other=0.0)
        acc *= derivative(t.to(tl.float32), ACTIVATION)
    if HAS_BIAS:
        place = bias_ptr + tl.load(methods_ptr + 2 * g + 1) + offs_r
        acc += tl.load(place, mask=offs_r < rank, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + rows * stride_om + offs_r[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=mask)


def routed_reduce_rows(
    parts: Tensor,
    out: Tensor,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    activation: str = "identity",
    scales: Tensor | None = None,
    drop: RoutedDropout | None = None,
) -> None:
    """Write drop(s Σ_j parts[j]) f'(t) + bias to ``out``, where a row has ranks of its method."""
    J, M, R = parts.shape
    block_m, block_r = 16, min(padded(R), 64)
    tables = (None, None, None) if drop is None else masks(drop)
    routed_reduce_rows_kernel[(rows.tiles(block_m), cdiv(R, block_r))](
        parts, bias, t, out, rows.order, rows.starts, rows.methods, scales, *tables,
        J, M, len(rows.ranks), R, 0 if t is None else t.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, HAS_SCALES=scales is not None, ACTIVATION=activation,
        DROP=tables[0] is not None, ALIGNED=rows.aligned, BLOCK_M=block_m, BLOCK_R=block_r,
        BLOCK_G=BLOCK_METHODS, num_warps=4,
    )  # fmt: skip


@launched
@triton.jit
def routed_reduce_kernel(
    parts_ptr,
    out_ptr,
    starts_ptr,
    methods_ptr,
    scales_ptr,
    part_m,
    capacity,
    width,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    # a gradient of one method: the sum over the parts of its rows, zeros if it has none
    g = tl.program_id(0)
    size = tl.load(methods_ptr + 2 * g).to(tl.int64) * width
    offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK >= size:
        return
    before = 0
    for h in range(0, g, BLOCK_G):
        lower = h + tl.arange(0, BLOCK_G)
        start = tl.load(starts_ptr + lower, mask=lower < g, other=0)
        end = tl.load(starts_ptr + lower + 1, mask=lower < g, other=0)
        before += tl.sum(tl.cdiv(end - start, part_m), 0)
    count = tl.cdiv(tl.load(starts_ptr + g + 1) - tl.load(starts_ptr + g), part_m)
    acc = tl.zeros((BLOCK,), tl.float32)
    place = parts_ptr + tl.cast(before, tl.int64) * capacity + offs
    for _ in range(0, count):
        acc += tl.load(place, mask=offs < size, other=0.0)
        place += capacity
    if HAS_SCALES:
        acc *= tl.load(scales_ptr + g)
    place = out_ptr + tl.load(methods_ptr + 2 * g + 1).to(tl.int64) * width + offs
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=offs < size)


def routed_reduce(
    parts: Tensor,
    out: Tensor,
    rows: Rows,
    part_m: int,
    width: int,
    *,
    scales: Tensor | None = None,
    each: bool = False,
) -> None:
    """Write the gradient of every method to ``out``: R_g ``width`` numbers each, or ``width`` with
    ``each``. ``parts`` has the sums of ``part_m`` rows of one method each, in the tiles' order."""
    count, capacity = len(rows.ranks), parts[0].numel()
    methods = rows.methods
    if each:
        methods = constant(tuple((1, g) for g in range(count)), torch.int32, out.device)
    routed_reduce_kernel[(count, cdiv(capacity, BLOCK_SIZE))](
        parts, out, rows.starts, methods, scales, part_m, capacity, width,
        HAS_SCALES=scales is not None, BLOCK=BLOCK_SIZE, BLOCK_G=BLOCK_METHODS, num_warps=4,
    )  # fmt: skip
