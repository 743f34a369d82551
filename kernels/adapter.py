"""A sequential or parallel adapter in one kernel: the bottleneck never leaves the chip.

Shapes   x (M, K), down (R, K), up (N, R), base and y (M, N), biases (R) and (N); norm weight and
         bias (K); t (M, R), kept only if a backward will read it. R <= 128.
         The weights may be fp32 beside a 16-bit x: rounded to x's dtype as loaded.
Maths    t = in(x) Dᵀ + d;  y = base + s (drop(f(t)) Uᵀ + u);  in = identity or LayerNorm
Traffic  reads M K + M N + (K + N) R, writes M N (and M R for t). LayerNorm reads x's rows once
         more, from the L2 cache, for mean and deviation. Each block of rows reads the weights
         once, from the L2 cache too. Without this kernel: M R written and read, one launch more.
Flops    2 M R (K + N): memory-bound for R <= 128.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import bottleneck as dropped_activation
from pelt_fast.kernels.common import dot
from pelt_fast.kernels.config import cdiv, padded, pick
from pelt_fast.kernels.launch import launched
from pelt_fast.kernels.norm import row_moments
from pelt_fast.ops.common import dropout as philox
from pelt_fast.ops.common.bundles import LAYER_NORM_EPS


@launched
@triton.jit
def adapter_fwd_kernel(
    x_ptr,
    down_ptr,
    down_bias_ptr,
    up_ptr,
    up_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    base_ptr,
    seed_ptr,
    t_ptr,
    y_ptr,
    scale,
    eps,
    threshold,
    keep_scale,
    M,
    K,
    N,
    R,
    stride_xm,
    stride_dr,
    stride_un,
    stride_base,
    stride_tm,
    stride_ym,
    HAS_DOWN_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    KEEP_T: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # one program owns BLOCK_M rows from x to y
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k, offs_r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    mask_m, mask_r = (offs_m < M)[:, None], offs_r < R
    scale = tl.cast(scale, tl.float32)
    kept = tl.cast(keep_scale, tl.float32)
    low = x_ptr.dtype.element_ty
    x_base = x_ptr + offs_m[:, None] * stride_xm
    down_base = down_ptr + offs_r[None, :].to(tl.int64) * stride_dr
    if LAYER_NORM:
        mean, rstd = row_moments(
            x_base, offs_k, mask_m, K, tl.cast(eps, tl.float32), BLOCK_M, BLOCK_K
        )
    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = offs_k + k < K
        x = tl.load(x_base + k + offs_k[None, :], mask=mask_m & inside[None, :], other=0.0)
        if LAYER_NORM:
            weight = tl.load(norm_weight_ptr + k + offs_k, mask=inside, other=0.0).to(tl.float32)
            shift = tl.load(norm_bias_ptr + k + offs_k, mask=inside, other=0.0).to(tl.float32)
            x = (x.to(tl.float32) - mean) * rstd * weight[None, :] + shift[None, :]
            x = x.to(low)
        down = tl.load(
            down_base + (k + offs_k)[:, None], mask=inside[:, None] & mask_r[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_R]
        t = dot(x, down.to(low), t)
    if HAS_DOWN_BIAS:
        t += tl.load(down_bias_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    # f of the rounded t, which is what backward will read
    t = t.to(low)
    if KEEP_T:
        tl.store(
            t_ptr + offs_m[:, None] * stride_tm + offs_r[None, :], t, mask=mask_m & mask_r[None, :]
        )
    h = dropped_activation(
        t.to(tl.float32), seed_ptr, offs_m, 0, R, threshold, kept, ACTIVATION, DROP, ALIGNED,
        BLOCK_R,
    ).to(low)  # fmt: skip
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        up = tl.load(
            up_ptr + offs_n[None, :].to(tl.int64) * stride_un + offs_r[:, None],
            mask=mask_n[None, :] & mask_r[:, None],
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        inside = mask_m & mask_n[None, :]
        base = tl.load(
            base_ptr + offs_m[:, None] * stride_base + offs_n[None, :], mask=inside, other=0.0
        )
        update = dot(h, up.to(low), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        if HAS_UP_BIAS:
            bias = tl.load(up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            update += (bias * scale)[None, :]
        y = (base.to(tl.float32) + update).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], y, mask=inside)


def adapter(
    x: Tensor,
    base: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    activation: str = "relu",
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    keep_t: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return y (M, N) = base + scale (drop(f(in(x) downᵀ + down_bias)) upᵀ + up_bias) and the
    pre-activations t (M, R), or None without ``keep_t``; ``norm``: LayerNorm's weight and bias."""
    (M, K), (N, R) = x.shape, up.shape
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    t = x.new_empty(M, R) if keep_t else None
    if M == 0:
        return y, t
    tile = pick("adapter", 8 * x.element_size(), R, x.device)
    norm_weight, norm_bias = (None, None) if norm is None else norm
    adapter_fwd_kernel[(cdiv(M, tile.block_m),)](
        x, down, down_bias, up, up_bias, norm_weight, norm_bias, base, seed, t, y,
        scale, LAYER_NORM_EPS, philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        M, K, N, R, x.stride(0), down.stride(0), up.stride(0), base.stride(0), R, y.stride(0),
        HAS_DOWN_BIAS=down_bias is not None, HAS_UP_BIAS=up_bias is not None,
        LAYER_NORM=norm is not None, KEEP_T=keep_t, ACTIVATION=activation, DROP=seed is not None,
        ALIGNED=R % 8 == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        BLOCK_R=padded(R), **tile.launch,
    )  # fmt: skip
    return y, t
