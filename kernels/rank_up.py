"""y = drop(base) + drop_u(s h Bᵀ) + bias, the second half of a rank-R update, and its backward.

Shapes   h (M, R), b (N, R) of any strides (Aᵀ serves for dx += drop(ds A)), base and y (M, N),
         bias (N); dy (M, N), t (M, R), dt (M, R), db (N, R), d_bias (N).
         b and bias may be fp32 beside a bf16 or fp16 y: rounded to y's dtype as loaded.
Maths    forward   y = drop(base) + drop_u(s h bᵀ) + s bias, one mask or none; in place or not
         backward  dt = s drop_h(dy b) f'(t),  db = s dyᵀ h,  d_bias = s Σ_m dy,  h = drop_h(f(t))
Traffic  forward   reads M N + (M + N) R, writes M N; each block of n reads h once more
         backward  reads dy once: M N + (M + N) R; workspace 4 (J M + I N) R bytes, written and
                   read, for J = N / BLOCK_N column and I row parts.
Flops    2 M N R forward, 4 M N R backward: memory-bound for R <= 64; above, library GEMMs do the
         backward (the ``gpu`` files of ``ops``).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import bottleneck, column_sums, dot, fold, keep_tile, load_mask
from pelt_fast.kernels.config import cdiv, padded, pick, split
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.reduce import reduce_groups, reduce_parts
from pelt_fast.ops.common import dropout as philox


@launched
@triton.jit
def rank_up_fwd_kernel(
    h_ptr,
    b_ptr,
    bias_ptr,
    base_ptr,
    seed_ptr,
    bits_ptr,
    y_ptr,
    scale,
    threshold,
    keep_scale,
    M,
    N,
    stride_hm,
    stride_bn,
    stride_br,
    stride_base,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    DROP_BASE: tl.constexpr,
    DROP_UPDATE: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program owns one tile of y; neighbours along n read the same rows of h
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = (tl.program_id(0) % tiles_n) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N
    base = tl.load(
        base_ptr + offs_m[:, None] * stride_base + offs_n[None, :], mask=mask_m & mask_n, other=0.0
    )  # [BLOCK_M, BLOCK_N]
    if HAS_BITS:
        keep = load_mask(bits_ptr, offs_m, first_n, M, N, BLOCK_N)
    elif DROP_BASE or DROP_UPDATE:
        keep = keep_tile(seed_ptr, offs_m, first_n, N, threshold, ALIGNED, BLOCK_N)
    # the mask acts on base in its loaded layout, where a thread holds the 8 elements of a draw.
    # In the layout of the product a thread holds 2, and each draw would be made four times
    if DROP_BASE:
        base = tl.where(keep, base, 0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        h = tl.load(
            h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :],
            mask=mask_m & (offs_r < R)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        place = b_ptr + offs_n.to(tl.int64)[None, :] * stride_bn
        b = tl.load(
            place + offs_r.to(tl.int64)[:, None] * stride_br,
            mask=mask_n & (offs_r < R)[:, None],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        acc = dot(h, b.to(h.dtype), acc)
    kept = tl.cast(keep_scale, tl.float32)
    scale = tl.cast(scale, tl.float32)
    update = acc * (scale * kept if DROP_UPDATE else scale)
    if DROP_UPDATE:
        update = tl.where(keep, update, 0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        update += (bias * scale)[None, :]
    y = base.to(tl.float32)
    y = (y * kept if DROP_BASE else y) + update
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y, mask=mask_m & mask_n)


@launched
@triton.jit
def rank_up_bwd_kernel(
    dy_ptr,
    t_ptr,
    b_ptr,
    seed_ptr,
    dt_ptr,
    db_ptr,
    d_bias_ptr,
    threshold,
    keep_scale,
    M,
    N,
    R,
    part_m,
    stride_dm,
    stride_tm,
    stride_bn,
    NEED_DT: tl.constexpr,
    NEED_DB: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program loops over a part of the rows of one block of columns. It reads each tile of dy
    # once and adds to dt (a part for every block of columns) and db (a part for these rows)
    column = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    offs_m = part * part_m + tl.arange(0, BLOCK_M)
    mask_n, mask_r = (offs_n < N)[None, :], (offs_r < R)[None, :]
    last = tl.minimum(tl.cast(M, tl.int64), (part + 1) * part_m)
    if NEED_DT:
        b = tl.load(
            b_ptr + offs_n.to(tl.int64)[:, None] * stride_bn + offs_r[None, :],
            mask=(offs_n < N)[:, None] & mask_r,
            other=0.0,
        ).to(dy_ptr.dtype.element_ty)  # [BLOCK_N, BLOCK_R]
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    # running sums of every 16th row: a thread holds all of them, so that no tile needs an exchange;
    # exact fp32 products leave no registers for that
    SUMS: tl.constexpr = 1 if dy_ptr.dtype.element_ty == tl.float32 else 16
    total = tl.zeros((SUMS, BLOCK_N), tl.float32)
    dy_place = dy_ptr + offs_m[:, None] * stride_dm + offs_n[None, :]
    for m in range(0, part_m, BLOCK_M):
        rows = offs_m + m
        mask_m = rows[:, None] < last
        dy = tl.load(dy_place, mask=mask_m & mask_n, other=0.0)  # [BLOCK_M, BLOCK_N]
        if NEED_DT:
            dt = dot(dy, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            place = dt_ptr + (column * M + rows)[:, None] * R + offs_r[None, :]
            tl.store(place, dt, mask=mask_m & mask_r)
        if NEED_DB:
            t = tl.load(
                t_ptr + rows[:, None] * stride_tm + offs_r[None, :], mask=mask_m & mask_r, other=0.0
            )  # [BLOCK_M, BLOCK_R]
            kept = tl.cast(keep_scale, tl.float32)
            h = bottleneck(
                t.to(tl.float32), seed_ptr, rows, 0, R, threshold, kept, ACTIVATION, DROP, ALIGNED,
                BLOCK_R,
            )  # fmt: skip
            if HAS_BIAS and ACTIVATION == "identity" and not DROP:
                # h passes through registers (kept is 1), so that this iteration waits for db. dy is
                # summed too; for it Triton 3.6 allocates one buffer too few, and the copy of the
                # next tile would overwrite data that wgmma still reads (docs/facts.md)
                h *= kept
            db = dot(tl.trans(dy), h.to(dy.dtype), db)
        if HAS_BIAS:
            total += fold(dy.to(tl.float32), SUMS)
        dy_place += BLOCK_M * tl.cast(stride_dm, tl.int64)
    if NEED_DB:
        place = db_ptr + (part * N + offs_n)[:, None] * R + offs_r[None, :]
        tl.store(place, db, mask=(offs_n < N)[:, None] & mask_r)
    if HAS_BIAS:
        sums = tl.sum(total, 0) if SUMS == 1 else column_sums(total)
        tl.store(d_bias_ptr + part * N + offs_n, sums, mask=offs_n < N)


def rank_up(
    h: Tensor,
    b: Tensor,
    base: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    base_dropout_p: float = 0.0,
    update_dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
) -> Tensor:
    """Return drop(base) + drop(scale h bᵀ) + scale bias, in ``out`` (base itself: in place).

    At most one of the two dropouts acts; ``seed`` is its seed. ``bits`` (M, N / 8), from
    ``mask_bits``, is its mask if it exists already.
    """
    (M, R), N = h.shape, b.shape[0]
    if out is None:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    tile = pick("rank_up", 8 * base.element_size(), R, base.device)
    drop_base, drop_update = base_dropout_p > 0, update_dropout_p > 0
    p = max(base_dropout_p, update_dropout_p) if seed is not None else 0.0
    grid = (cdiv(M, tile.block_m) * cdiv(N, tile.block_n),)
    rank_up_fwd_kernel[grid](
        h, b, bias, base, seed, bits, out,
        scale, philox.threshold(p), philox.keep_scale(p),
        M, N, h.stride(0), b.stride(0), b.stride(1), base.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, DROP_BASE=drop_base and seed is not None,
        DROP_UPDATE=drop_update and seed is not None, HAS_BITS=bits is not None,
        ALIGNED=N % 8 == 0, R=R,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=min(padded(R), tile.block_r),
        **tile.launch,
    )  # fmt: skip
    return out


def rank_up_bwd(
    dy: Tensor,
    t: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    activation: str = "identity",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    need_dt: bool = True,
    need_db: bool = True,
    need_bias: bool = False,
    dt: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dt (M, R) in dy's dtype, db (N, R) and d_bias (N) in b's, from one read of dy.

    ``t`` holds the pre-activations; h = drop(f(t)) is recomputed. A gradient that is not needed is
    None. ``dt`` may be a tensor to write to.
    """
    (M, N), R = dy.shape, b.shape[1]
    tile = pick("rank_up_bwd", 8 * dy.element_size(), R, dy.device)
    columns = cdiv(N, tile.block_n)
    blocks = cdiv(M, tile.block_m)
    part_blocks, parts = split(columns, blocks, dy.device, tile.programs)

    def workspace(*shape: int, needed: bool) -> Tensor | None:
        return dy.new_empty(shape, dtype=torch.float32) if needed else None

    dt_parts = workspace(columns, M, R, needed=need_dt)
    db_parts = workspace(parts, N, R, needed=need_db)
    bias_parts = workspace(parts, N, needed=need_bias)
    rank_up_bwd_kernel[(columns, parts)](
        dy, t, b, seed, dt_parts, db_parts, bias_parts,
        philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        M, N, R, part_blocks * tile.block_m, dy.stride(0), t.stride(0), b.stride(0),
        NEED_DT=need_dt, NEED_DB=need_db, HAS_BIAS=need_bias, ACTIVATION=activation,
        DROP=seed is not None, ALIGNED=R % 8 == 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=padded(R), **tile.launch,
    )  # fmt: skip
    plain = activation == "identity" and seed is None
    if need_dt and dt is None:
        dt = dy.new_empty(M, R)
    db = dy.new_empty(N, R, dtype=b.dtype) if need_db else None
    d_bias = dy.new_empty(N, dtype=b.dtype) if need_bias else None
    if need_dt and not plain:
        reduce_parts(
            dt_parts, dt, scale=scale, t=t, activation=activation, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    groups = [(dt_parts if plain else None, dt), (db_parts, db), (bias_parts, d_bias)]
    reduce_groups(groups, scale=scale)
    return dt, db, d_bias
