"""S = f(drop(x) Aᵀ + a), the first half of a rank-R update, and its backward: one read of x each.

Shapes   x (M, K), a (R, K), bias (R), s and h (M, R); ds (M, R), da (R, K); last dim contiguous.
         With a LayerNorm before: moments (2, M) of x's rows, its weight and bias (K).
         The weights may be fp32 beside a bf16 or fp16 x: they are rounded to x's dtype as loaded.
Maths    forward   s = drop(x) aᵀ + bias,  h = drop_h(f(s)) on request
         backward  da = dsᵀ drop(x),  d_bias = Σ_m ds
         LayerNorm x -> n w + b forward, x -> n backward, n = (x - mean) rstd (``norm``)
         d_bias is a separate sum. In the loop of the product, ds would have two users, and
         Triton 3.6 then copies the next tile over data that wgmma still reads (docs/facts.md)
         dx += drop(ds a) is ``rank_up`` with the mask on the update.
Traffic  forward   reads M K + R K, writes M R (split over K: 2 J M R fp32 more, J parts)
         backward  reads M K + M R, writes R K (2 J R K fp32 more, J <= 64 parts over M);
                   d_bias reads M R once more: R / K of what da reads
Flops    2 M K R each: memory-bound for R <= 128. Above one rank block x is read again for each,
         from the L2 cache if its programs run at the same time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import dot, keep_tile, load_mask, store_rank
from pelt_fast.kernels.config import cdiv, padded, pick, split
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.reduce import reduce_parts
from pelt_fast.ops.common import dropout as philox


@launched
@triton.jit
def rank_down_fwd_kernel(
    x_ptr,
    a_ptr,
    bias_ptr,
    seed_ptr,
    h_seed_ptr,
    moments_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    s_ptr,
    h_ptr,
    threshold,
    keep_scale,
    h_threshold,
    h_keep_scale,
    M,
    K,
    R,
    part_k,
    stride_xm,
    stride_ar,
    stride_sm,
    stride_hm,
    HAS_BIAS: tl.constexpr,
    HAS_H: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    DROP_H: tl.constexpr,
    NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    H_ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program owns a tile of s, or of one part of it when the loop over K is split
    # rank blocks of the same rows run at the same time
    tiles_r = tl.cdiv(R, BLOCK_R)
    offs_m = (tl.program_id(0) // tiles_r).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_r = (tl.program_id(0) % tiles_r) * BLOCK_R
    offs_r = first_r + tl.arange(0, BLOCK_R)
    part = tl.program_id(1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_r = offs_m[:, None] < M, offs_r[:, None] < R
    x_place = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    a_place = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + offs_k[None, :]
    if NORM:
        mean = tl.load(moments_ptr + offs_m[:, None], mask=mask_m, other=0.0)
        rstd = tl.load(moments_ptr + M + offs_m[:, None], mask=mask_m, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    last = tl.minimum(K, (part + 1) * part_k).to(tl.int32)
    for k in range((part * part_k).to(tl.int32), last, BLOCK_K):
        mask_k = (k + offs_k)[None, :] < K
        x = tl.load(x_place + k, mask=mask_m & mask_k, other=0.0)  # [BLOCK_M, BLOCK_K]
        a = tl.load(a_place + k, mask=mask_r & mask_k, other=0.0)  # [BLOCK_R, BLOCK_K]
        if DROP:
            keep = keep_tile(seed_ptr, offs_m, k, K, threshold, ALIGNED, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        if NORM:
            inside = k + offs_k < K
            weight = tl.load(norm_weight_ptr + k + offs_k, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + k + offs_k, mask=inside, other=0.0).to(tl.float32)
            n = (x.to(tl.float32) - mean) * rstd
            x = (n * weight[None, :] + shift[None, :]).to(x.dtype)
        acc = dot(x, tl.trans(a.to(x.dtype)), acc)
    if DROP:
        acc *= tl.cast(keep_scale, tl.float32)
    if SPLIT:
        place = s_ptr + (part * M + offs_m)[:, None] * R + offs_r[None, :]
        tl.store(place, acc, mask=mask_m & (offs_r < R)[None, :])
    else:
        store_rank(
            acc, bias_ptr, h_seed_ptr, s_ptr, h_ptr, offs_m, first_r, M, R, h_threshold,
            tl.cast(h_keep_scale, tl.float32), stride_sm, stride_hm, HAS_BIAS, HAS_H, ACTIVATION,
            DROP_H, H_ALIGNED, BLOCK_R,
        )  # fmt: skip


@launched
@triton.jit
def rank_down_bwd_kernel_da(
    ds_ptr,
    x_ptr,
    seed_ptr,
    bits_ptr,
    moments_ptr,
    da_ptr,
    threshold,
    keep_scale,
    M,
    K,
    R,
    part_m,
    stride_dm,
    stride_xm,
    DROP: tl.constexpr,
    HAS_BITS: tl.constexpr,
    NORM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program owns a tile of da for one part of the rows; parts are summed by reduce_parts
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    part = tl.program_id(2).to(tl.int64)
    offs_m = part * part_m + tl.arange(0, BLOCK_M)
    mask_k, mask_r = (offs_k < K)[None, :], (offs_r < R)[None, :]
    last = tl.minimum(tl.cast(M, tl.int64), (part + 1) * part_m)
    acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    x_place = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    ds_place = ds_ptr + offs_m[:, None] * stride_dm + offs_r[None, :]
    for m in range(0, part_m, BLOCK_M):
        mask_m = (offs_m + m)[:, None] < last
        x = tl.load(x_place, mask=mask_m & mask_k, other=0.0)  # [BLOCK_M, BLOCK_K]
        ds = tl.load(ds_place, mask=mask_m & mask_r, other=0.0)  # [BLOCK_M, BLOCK_R]
        if HAS_BITS:
            keep = load_mask(bits_ptr, offs_m + m, first_k, M, K, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        elif DROP:
            keep = keep_tile(seed_ptr, offs_m + m, first_k, K, threshold, ALIGNED, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        if NORM:
            place = moments_ptr + (offs_m + m)[:, None]
            mean = tl.load(place, mask=mask_m, other=0.0)
            rstd = tl.load(place + M, mask=mask_m, other=0.0)
            x = ((x.to(tl.float32) - mean) * rstd).to(x.dtype)
        acc = dot(tl.trans(x), ds, acc)
        x_place += BLOCK_M * tl.cast(stride_xm, tl.int64)
        ds_place += BLOCK_M * tl.cast(stride_dm, tl.int64)
    if DROP:
        acc *= tl.cast(keep_scale, tl.float32)
    place = da_ptr + (part * R + offs_r)[None, :] * K + offs_k[:, None]
    tl.store(place, acc, mask=(offs_k < K)[:, None] & mask_r)


def rank_down(
    x: Tensor,
    a: Tensor,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    activation: str | None = None,
    h_dropout_p: float = 0.0,
    h_seed: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return s = drop(x) aᵀ + bias (M, R) in x's dtype and, with ``activation``, h = drop(f(s)).

    ``norm``: the moments of x's rows, weight and bias of a LayerNorm that acts on x first.
    """
    (M, K), R = x.shape, a.shape[0]
    s = x.new_empty(M, R)
    h = None if activation is None else torch.empty_like(s)
    if M == 0:
        return s, h
    name = "rank_down" if norm is None else "rank_down_norm"
    tile = pick(name, 8 * x.element_size(), R, x.device)
    block_r = min(padded(R), tile.block_r)
    programs = cdiv(M, tile.block_m) * cdiv(R, block_r)
    blocks = cdiv(K, tile.block_k)
    part_blocks, parts = split(programs, blocks, x.device, tile.programs)
    out = s if parts == 1 else x.new_empty(parts, M, R, dtype=torch.float32)
    rank_down_fwd_kernel[(programs, parts)](
        x, a, bias, seed, h_seed, *(norm or (None, None, None)), out, h,
        philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        philox.threshold(h_dropout_p), philox.keep_scale(h_dropout_p),
        M, K, R, part_blocks * tile.block_k, x.stride(0), a.stride(0), R, R,
        HAS_BIAS=bias is not None, HAS_H=h is not None, ACTIVATION=activation or "identity",
        DROP=seed is not None, DROP_H=h_seed is not None, NORM=norm is not None, ALIGNED=K % 8 == 0,
        H_ALIGNED=R % 8 == 0, SPLIT=parts > 1, BLOCK_M=tile.block_m, BLOCK_K=tile.block_k,
        BLOCK_R=block_r, **tile.launch,
    )  # fmt: skip
    if parts > 1:
        reduce_parts(
            out, s, bias=bias, h=h, activation=activation or "identity",
            dropout_p=h_dropout_p, seed=h_seed,
        )  # fmt: skip
    return s, h


def rank_down_parts(
    ds: Tensor,
    x: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    bits: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """The first stage of :func:`rank_down_bwd`: parts of da (J, R, K), fp32. With ``moments``
    (2, M), x is normalised as it is read."""
    (M, K), R = x.shape, ds.shape[1]
    name = "rank_down_bwd" if moments is None else "rank_down_bwd_norm"
    tile = pick(name, 8 * x.element_size(), R, x.device)
    block_r = min(padded(R), tile.block_r)
    programs = cdiv(K, tile.block_k) * cdiv(R, block_r)
    blocks = cdiv(M, tile.block_m)
    part_blocks, parts = split(programs, blocks, x.device, tile.programs)
    da_parts = x.new_empty(parts, R, K, dtype=torch.float32)
    grid = (cdiv(R, block_r), cdiv(K, tile.block_k), parts)
    rank_down_bwd_kernel_da[grid](
        ds, x, seed, bits, moments, da_parts,
        philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        M, K, R, part_blocks * tile.block_m, ds.stride(0), x.stride(0),
        DROP=seed is not None, HAS_BITS=bits is not None,
        NORM=moments is not None, ALIGNED=K % 8 == 0,
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=block_r, **tile.launch,
    )  # fmt: skip
    return da_parts


def rank_down_bwd(
    ds: Tensor,
    x: Tensor,
    dtype: torch.dtype,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    with_bias: bool = False,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return da = dsᵀ drop(x) (R, K) and, on request, the bias gradient (R), in ``dtype``.

    ``bits`` (M, K / 8), from ``mask_bits``, is the mask if it exists already.
    """
    R, K = ds.shape[1], x.shape[1]
    da = x.new_empty(R, K, dtype=dtype)
    reduce_parts(rank_down_parts(ds, x, dropout_p=dropout_p, seed=seed, bits=bits), da)
    return da, ds.sum(0, dtype=torch.float32).to(dtype) if with_bias else None
