"""A frozen GEMM that adds the rank update after its K loop, as a rank tail (docs/maths.md#i2): no
extra pass over the output.

Shapes   x (M, K), w (K, N) of any strides (Wᵀ forward, W for dx), s (M, R), u (R, N) of any strides
         (Bᵀ forward, A for dx), bias (N), y (M, N); u may be fp32 beside a 16-bit x.
Maths    y = x w + bias + drop(scale s u), fp32 accumulation
Traffic  reads M K + K N + (M + N) R, writes M N: R / K more than the GEMM alone. The accumulate
         plan reads and writes y once more, 2 M N.
Flops    2 M N (K + R). Two variants: pointers (every GPU), and tensor descriptors in a persistent
         loop (sm_90 up): bulk copies, no warp specialisation, tiles in groups for the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import dot, keep_tile, load_mask
from pelt_fast.kernels.config import cdiv, padded, pick, processors
from pelt_fast.kernels.launch import launched
from pelt_fast.ops.common import dropout as philox

GROUP_M = 8  # row tiles whose column tiles run at the same time: w and x from the L2 cache


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of tile number ``tile``: GROUP_M rows of tiles at a time, column by column."""
    width = GROUP_M * tiles_n
    first_m = (tile // width) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % width) % rows, (tile % width) // rows


@triton.jit
def rank_tail(
    acc,
    s_ptr,
    u_ptr,
    bias_ptr,
    seed_ptr,
    bits_ptr,
    scale,
    threshold,
    keep_scale,
    M,
    N,
    stride_sm,
    stride_ur,
    stride_un,
    offs_m,
    first_n,
    low: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + drop(scale s u) + bias. Without a mask the product accumulates into acc."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    scale = tl.cast(scale, tl.float32)
    tail = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if DROP else acc
    for r in tl.static_range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        s = tl.load(
            s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
            mask=(offs_m < M)[:, None] & (offs_r < R)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_R]
        place = u_ptr + offs_r.to(tl.int64)[:, None] * stride_ur
        u = tl.load(
            place + offs_n.to(tl.int64)[None, :] * stride_un,
            mask=(offs_r < R)[:, None] & (offs_n < N)[None, :],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        tail = dot(s, (u.to(tl.float32) * scale).to(low), tail)
    if DROP:
        if HAS_BITS:
            keep = load_mask(bits_ptr, offs_m, first_n, M, N, BLOCK_N)
        else:
            keep = keep_tile(seed_ptr, offs_m, first_n, N, threshold, ALIGNED, BLOCK_N)
        acc += tl.where(keep, tail * tl.cast(keep_scale, tl.float32), 0.0)
    else:
        acc = tail
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@launched
@triton.jit
def tail_gemm_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    u_ptr,
    bias_ptr,
    seed_ptr,
    bits_ptr,
    y_ptr,
    scale,
    threshold,
    keep_scale,
    M,
    N,
    K,
    stride_xm,
    stride_wk,
    stride_wn,
    stride_sm,
    stride_ur,
    stride_un,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = tile_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    x_place = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    w_place = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wk
    w_place += offs_n.to(tl.int64)[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = offs_k + k < K
        x = tl.load(x_place, mask=mask_m & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        w = tl.load(w_place, mask=inside[:, None] & mask_n, other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = dot(x, w, acc)
        x_place += BLOCK_K
        w_place += BLOCK_K * tl.cast(stride_wk, tl.int64)
    acc = rank_tail(
        acc, s_ptr, u_ptr, bias_ptr, seed_ptr, bits_ptr, scale, threshold, keep_scale, M, N,
        stride_sm, stride_ur, stride_un, offs_m, first_n, x_ptr.dtype.element_ty, HAS_BIAS, DROP,
        HAS_BITS, ALIGNED, R, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y, mask=mask_m & mask_n)


@triton.jit
def tail_gemm_descriptor_kernel(
    x_ptr,
    w_ptr,
    s_ptr,
    u_ptr,
    bias_ptr,
    seed_ptr,
    bits_ptr,
    y_ptr,
    scale,
    threshold,
    keep_scale,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_sm,
    stride_ur,
    stride_un,
    stride_y,
    PROGRAMS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROP: tl.constexpr,
    HAS_BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # TRANSPOSED: w is stored as (N, K)
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
    if TRANSPOSED:
        w_desc = tl.make_tensor_descriptor(w_ptr, [N, K], [stride_w, 1], [BLOCK_N, BLOCK_K])
    else:
        w_desc = tl.make_tensor_descriptor(w_ptr, [K, N], [stride_w, 1], [BLOCK_K, BLOCK_N])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [stride_y, 1], [BLOCK_M, BLOCK_N])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([first_m, k])
            w = w_desc.load([first_n, k]).T if TRANSPOSED else w_desc.load([k, first_n])
            acc = dot(x, w, acc)
        offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        acc = rank_tail(
            acc, s_ptr, u_ptr, bias_ptr, seed_ptr, bits_ptr, scale, threshold, keep_scale, M, N,
            stride_sm, stride_ur, stride_un, offs_m, first_n, x_ptr.dtype.element_ty, HAS_BIAS,
            DROP, HAS_BITS, ALIGNED, R, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        y_desc.store([first_m, first_n], acc.to(y_ptr.dtype.element_ty))


def can_use_descriptors(*tensors: Tensor) -> bool:
    """Whether every matrix can have a tensor descriptor: rows start on 16 bytes, their length is a
    multiple of 16 bytes, the last dim is contiguous, and there are enough elements for a block."""
    return all(
        t.stride(-1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
        and min(t.shape) >= 16
        for t in tensors
    )  # fmt: skip


def tail_gemm(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    u: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    descriptors: bool = False,
) -> Tensor:
    """Return x w + bias + drop(scale s u): x (M, K), w (K, N), s (M, R), u (R, N).

    ``descriptors`` selects the persistent variant; tensors that it cannot take run the other one.
    """
    (M, K), N, R = x.shape, w.shape[1], s.shape[1]
    y = x.new_empty(M, N)
    if y.numel() == 0:
        return y
    transposed = w.stride(1) != 1
    stored = w.t() if transposed else w
    common = (x, w, s, u, bias, seed, bits, y, scale, philox.threshold(dropout_p),
              philox.keep_scale(dropout_p), M, N, K)  # fmt: skip
    flags = dict(
        HAS_BIAS=bias is not None, DROP=seed is not None, HAS_BITS=bits is not None,
        ALIGNED=N % 8 == 0, R=R, GROUP_M=GROUP_M,
    )  # fmt: skip
    rank = (s.stride(0), u.stride(0), u.stride(1))
    name = "tail_gemm" if seed is None else "tail_gemm_masked"
    if descriptors and can_use_descriptors(x, stored, y):
        name = "tail_gemm_descriptor"
    tile = pick(name, 8 * x.element_size(), R, x.device)
    blocks = dict(
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        BLOCK_R=min(padded(R), tile.block_r), **tile.launch,
    )  # fmt: skip
    tiles = cdiv(M, tile.block_m) * cdiv(N, tile.block_n)
    if name != "tail_gemm_descriptor":
        tail_gemm_kernel[(tiles,)](
            *common, x.stride(0), w.stride(0), w.stride(1), *rank, y.stride(0), **flags, **blocks
        )
        return y
    # where the kernel writes its descriptors
    triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device=x.device))
    programs = min(tiles, processors(x.device))
    tail_gemm_descriptor_kernel[(programs,)](
        *common, x.stride(0), stored.stride(0), *rank, y.stride(0), PROGRAMS=programs,
        TRANSPOSED=transposed, **flags, **blocks,
    )  # fmt: skip
    return y
