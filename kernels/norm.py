"""A LayerNorm before a rank-R product: its moments, and its backward without sums over K.

Shapes   x, dy, dx (M, K); moments (2, M) fp32: mean and 1 / sqrt(var + eps); weight and bias (K) of
         the LayerNorm; down (R, K), down_bias (R); t and dt (M, R), dt the gradient of t.
Maths    n = (x - mean) rstd,  u = n w + b,  t = u Dᵀ + d,  dn = (dt D) w
         dx = rstd (dn - c1 - n c2) [+ dy]  where a LayerNorm's backward sums over k twice:
         c1 = Σ_k dn / K = dt · (D w) / K,  c2 = Σ_k dn n / K = dt · (t - d - D b) / K
         With G = dtᵀ n (``rank_down_bwd`` with moments) and g = Σ_m dt:
         dD = G w + g bᵀ,  dw = Σ_r D G,  db = Σ_r D g
Traffic  dx: reads x (its rows once more, for the moments) and dy, writes dx; (2 M + K) R.
         Gradients: the parts of G, once. Nothing of size M x K but dx is made.
Flops    2 M K R: memory-bound for R <= 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import column_sums, dot, fold
from pelt_fast.kernels.config import cdiv, padded, pick
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.rank_down import rank_down_parts
from pelt_fast.ops.common.bundles import LAYER_NORM_EPS

COLUMNS = 64  # columns of a program that sums the small gradients


@triton.jit
def row_moments(x_base, offs_k, mask_m, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of rows, by sums of differences to each row's first element."""
    first = tl.load(x_base, mask=mask_m, other=0.0).to(tl.float32)  # [BLOCK_M, 1]
    total = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = mask_m & (offs_k + k < K)[None, :]
        x = tl.load(x_base + k + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - first, 0.0)
        total += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    shift = total / K
    variance = tl.maximum(squares / K - shift * shift, 0.0)
    return shift[:, None] + first, (1.0 / tl.sqrt(variance + eps))[:, None]


@launched
@triton.jit
def moments_kernel(
    x_ptr, moments_ptr, eps, M, K, stride_xm, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M)[:, None]
    x_base = x_ptr + offs_m[:, None] * stride_xm
    offs_k = tl.arange(0, BLOCK_K)
    eps = tl.cast(eps, tl.float32)
    mean, rstd = row_moments(x_base, offs_k, mask_m, K, eps, BLOCK_M, BLOCK_K)
    tl.store(moments_ptr + offs_m[:, None], mean, mask=mask_m)
    tl.store(moments_ptr + M + offs_m[:, None], rstd, mask=mask_m)


@launched
@triton.jit
def norm_bwd_kernel_dx(
    x_ptr,
    dy_ptr,
    dt_ptr,
    t_ptr,
    down_ptr,
    weight_ptr,
    sums_ptr,
    moments_ptr,
    dx_ptr,
    eps,
    M,
    K,
    stride_xm,
    stride_ym,
    stride_dm,
    stride_tm,
    stride_dr,
    stride_om,
    HAS_DY: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program owns BLOCK_M rows; sums holds D w and d + D b (R)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m = (offs_m < M)[:, None]
    low = x_ptr.dtype.element_ty
    x_base = x_ptr + offs_m[:, None] * stride_xm
    dt_base = dt_ptr + offs_m[:, None] * stride_dm + offs_r[None, :]
    t_base = t_ptr + offs_m[:, None] * stride_tm + offs_r[None, :]
    down_base = down_ptr + offs_r[:, None].to(tl.int64) * stride_dr + offs_k[None, :]
    eps = tl.cast(eps, tl.float32)
    mean, rstd = row_moments(x_base, offs_k, mask_m, K, eps, BLOCK_M, BLOCK_K)
    tl.store(moments_ptr + offs_m[:, None], mean, mask=mask_m)
    tl.store(moments_ptr + M + offs_m[:, None], rstd, mask=mask_m)
    c1 = tl.zeros((BLOCK_M,), tl.float32)
    c2 = tl.zeros((BLOCK_M,), tl.float32)
    for r in range(0, R, BLOCK_R):
        mask_r = offs_r + r < R
        inside = mask_m & mask_r[None, :]
        g = tl.load(dt_base + r, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_R]
        t = tl.load(t_base + r, mask=inside, other=0.0).to(tl.float32)
        dw = tl.load(sums_ptr + r + offs_r, mask=mask_r, other=0.0)
        e = tl.load(sums_ptr + R + r + offs_r, mask=mask_r, other=0.0)
        c1 += tl.sum(g * dw[None, :], 1)
        c2 += tl.sum(g * (t - e[None, :]), 1)
    c1, c2 = (c1 / K)[:, None], (c2 / K)[:, None]
    # a row of one element has n = 0 for any x: dn - c1 is 0 too, up to rounding
    slope = tl.where(K > 1, rstd, 0.0)
    dt = tl.load(dt_base, mask=mask_m & (offs_r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k + k < K
        inside = mask_m & mask_k[None, :]
        x = tl.load(x_base + k + offs_k[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + k + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        dn = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for r in range(0, R, BLOCK_R):
            mask_r = offs_r + r < R
            if R > BLOCK_R:  # else all of it was loaded before
                dt = tl.load(dt_base + r, mask=mask_m & mask_r[None, :], other=0.0)
            place = down_base + k + tl.cast(r, tl.int64) * stride_dr
            down = tl.load(place, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            dn = dot(dt, down.to(low), dn)
        n = (x - mean) * rstd
        dx = slope * (dn * weight[None, :] - c1 - n * c2)
        if HAS_DY:
            place = dy_ptr + offs_m[:, None] * stride_ym + k + offs_k[None, :]
            dx += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        place = dx_ptr + offs_m[:, None] * stride_om + k + offs_k[None, :]
        tl.store(place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@launched
@triton.jit
def norm_gradients_kernel(
    g_ptr,
    dt_sum_ptr,
    down_ptr,
    weight_ptr,
    bias_ptr,
    d_down_ptr,
    d_down_bias_ptr,
    d_weight_ptr,
    d_bias_ptr,
    J,
    K,
    R,
    stride_dr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program owns BLOCK_K columns and loops over the ranks; parts are summed in one order
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    d_weight = tl.zeros((8, BLOCK_K), tl.float32)
    d_bias = tl.zeros((8, BLOCK_K), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        inside = mask_r[:, None] & mask_k[None, :]
        rows = offs_r.to(tl.int64)[:, None]
        g = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        place = g_ptr + rows * K + offs_k[None, :]
        for _ in range(0, J):
            g += tl.load(place, mask=inside, other=0.0)
            place += tl.cast(R, tl.int64) * K
        down = tl.load(down_ptr + rows * stride_dr + offs_k[None, :], mask=inside, other=0.0)
        down = down.to(tl.float32)
        total = tl.load(dt_sum_ptr + offs_r, mask=mask_r, other=0.0)
        d_down = g * weight[None, :] + total[:, None] * bias[None, :]
        place = d_down_ptr + rows * K + offs_k[None, :]
        tl.store(place, d_down.to(d_down_ptr.dtype.element_ty), mask=inside)
        d_weight += fold(down * g, 8)
        d_bias += fold(down * total[:, None], 8)
        once = offs_r < tl.where(tl.program_id(0) == 0, R, 0)
        tl.store(d_down_bias_ptr + offs_r, total.to(d_down_bias_ptr.dtype.element_ty), mask=once)
    d_weight, d_bias = column_sums(d_weight), column_sums(d_bias)
    tl.store(d_weight_ptr + offs_k, d_weight.to(d_weight_ptr.dtype.element_ty), mask=mask_k)
    tl.store(d_bias_ptr + offs_k, d_bias.to(d_bias_ptr.dtype.element_ty), mask=mask_k)


def moments(x: Tensor) -> Tensor:
    """Mean and 1 / sqrt(var + eps) of each row of x (M, K): (2, M) fp32."""
    M, K = x.shape
    out = torch.empty(2, M, dtype=torch.float32, device=x.device)
    if M:
        tile = pick("norm", 8 * x.element_size(), 1, x.device)
        moments_kernel[(cdiv(M, tile.block_m),)](
            x, out, LAYER_NORM_EPS, M, K, x.stride(0),
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, **tile.launch,
        )  # fmt: skip
    return out


def norm_bwd(
    dt: Tensor,
    t: Tensor,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return dx (M, K), plus ``dy`` if given, and the moments (2, M) of x, from the gradient
    dt (M, R) of t = (norm(x) weight + bias) downᵀ + down_bias."""
    (M, K), R = x.shape, dt.shape[1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    out = torch.empty(2, M, dtype=torch.float32, device=x.device)
    if M == 0:
        return dx, out
    sums = torch.stack([weight, bias]).float() @ down.float().t()  # [2, R]
    if down_bias is not None:
        sums[1] += down_bias
    tile = pick("norm", 8 * x.element_size(), R, x.device)
    norm_bwd_kernel_dx[(cdiv(M, tile.block_m),)](
        x, dy, dt, t, down, weight, sums, out, dx, LAYER_NORM_EPS, M, K,
        x.stride(0), 0 if dy is None else dy.stride(0), dt.stride(0), t.stride(0), down.stride(0),
        dx.stride(0), HAS_DY=dy is not None, R=R,
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_R=min(padded(R), tile.block_r),
        **tile.launch,
    )  # fmt: skip
    return dx, out


def norm_gradients(
    dt: Tensor, x: Tensor, moments: Tensor, down: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of down (R, K), its bias (R), and the LayerNorm's weight and bias (K),
    each in the dtype of its tensor, from one read of x."""
    R, K = down.shape
    parts, dt_sum = rank_down_parts(dt, x, moments=moments), dt.sum(0, dtype=torch.float32)
    d_down, d_down_bias = down.new_empty(R, K), down.new_empty(R)
    d_weight, d_bias = weight.new_empty(K), bias.new_empty(K)
    norm_gradients_kernel[(cdiv(K, COLUMNS),)](
        parts, dt_sum, down, weight, bias, d_down, d_down_bias, d_weight, d_bias,
        parts.shape[0], K, R, down.stride(0),
        BLOCK_K=COLUMNS, BLOCK_R=min(padded(R), 32), num_warps=4,
    )  # fmt: skip
    return d_down, d_down_bias, d_weight, d_bias
