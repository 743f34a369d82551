"""The two-segment activation of a widened FFN, forward and backward, one elementwise pass each.

Shapes   pre (M, W): pre-activations [gate |] in | down [| padding], F, F, R columns and the rest;
         act (M, F + R [+ padding]), which may be the columns of pre from ``in`` on;
         d_pre (M, W); h (M, R). F = 0 leaves the bottleneck alone.
Maths    forward   act[:, :F] = drop_a(φ(Z)) or drop_a(φ(G) Z);  act[:, F:] = H = drop(f(T)), 0
         backward  d_pre holds dA in the columns of ``in`` and dH in those of ``down``; in place
                   dZ = drop_a(dA) φ'(Z), or dZ = drop_a(dA) φ(G) and dG = drop_a(dA) Z φ'(G);
                   dT = s drop(dH) f'(T);  padding = 0;  and H again on request
Traffic  forward   reads M (F + R) (gated 2F + R), writes M (F + R)
         backward  reads M 2 (F + R) (gated 3F + 2R), writes M (F + R) (gated 2F + R), M R for H
         at 16 bytes a thread and access. Integer work of the masks: see ``common``.
"""

import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import activate, bottleneck, derivative, keep_tile
from pelt_fast.kernels.config import cdiv, pick
from pelt_fast.kernels.launch import launched
from pelt_fast.ops.common import dropout as philox


@launched
@triton.jit
def widened_act_fwd_kernel(
    pre_ptr,
    act_ptr,
    seed_h_ptr,
    seed_a_ptr,
    threshold_h,
    keep_scale_h,
    threshold_a,
    keep_scale_a,
    M,
    F,
    R,
    padding,
    stride_pm,
    stride_am,
    GATED: tl.constexpr,
    FFN_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROP_H: tl.constexpr,
    DROP_A: tl.constexpr,
    ALIGNED_H: tl.constexpr,
    ALIGNED_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # a program is in one segment; if act is pre, it reads each element before it writes it
    tiles_f = tl.cdiv(F, BLOCK_N)
    tiles = tiles_f + tl.cdiv(R + padding, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) % tiles
    offs = tl.arange(0, BLOCK_N)
    pre = pre_ptr + rows[:, None] * stride_pm
    act = act_ptr + rows[:, None] * stride_am
    if tile < tiles_f:
        first = tile * BLOCK_N
        columns = (first + offs)[None, :]
        mask = (rows < M)[:, None] & (columns < F)
        z = tl.load(pre + columns, mask=mask, other=0.0).to(tl.float32)
        a = activate(z, FFN_ACTIVATION)
        if GATED:
            a *= tl.load(pre + F + columns, mask=mask, other=0.0).to(tl.float32)
        if DROP_A:
            keep = keep_tile(seed_a_ptr, rows, first, F, threshold_a, ALIGNED_A, BLOCK_N)
            a = tl.where(keep, a * tl.cast(keep_scale_a, tl.float32), 0.0)
        tl.store(act + columns, a.to(act_ptr.dtype.element_ty), mask=mask)
    else:
        first = (tile - tiles_f) * BLOCK_N
        columns = (first + offs)[None, :]
        mask = (rows < M)[:, None] & (columns < R)
        start = 2 * F if GATED else F
        t = tl.load(pre + start + columns, mask=mask, other=0.0).to(tl.float32)
        h = bottleneck(
            t, seed_h_ptr, rows, first, R, threshold_h, tl.cast(keep_scale_h, tl.float32),
            ACTIVATION, DROP_H, ALIGNED_H, BLOCK_N,
        )  # fmt: skip
        # columns past R are loaded as 0, and f(0) = 0
        inside = (rows < M)[:, None] & (columns < R + padding)
        tl.store(act + F + columns, h.to(act_ptr.dtype.element_ty), mask=inside)


@launched
@triton.jit
def widened_act_bwd_kernel(
    d_pre_ptr,
    pre_ptr,
    h_ptr,
    seed_h_ptr,
    seed_a_ptr,
    scale,
    threshold_h,
    keep_scale_h,
    threshold_a,
    keep_scale_a,
    M,
    F,
    R,
    padding,
    stride_dm,
    stride_pm,
    stride_hm,
    GATED: tl.constexpr,
    FFN_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_H: tl.constexpr,
    PAD_ONLY: tl.constexpr,
    DROP_H: tl.constexpr,
    DROP_A: tl.constexpr,
    ALIGNED_H: tl.constexpr,
    ALIGNED_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_f = tl.cdiv(F, BLOCK_N)
    tiles = tiles_f + tl.cdiv(R + padding, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) % tiles
    offs = tl.arange(0, BLOCK_N)
    pre = pre_ptr + rows[:, None] * stride_pm
    d_pre = d_pre_ptr + rows[:, None] * stride_dm
    low = d_pre_ptr.dtype.element_ty
    if tile < tiles_f:
        first = tile * BLOCK_N
        columns = (first + offs)[None, :]
        mask = (rows < M)[:, None] & (columns < F)
        place = d_pre + F + columns if GATED else d_pre + columns
        da = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        if DROP_A:
            keep = keep_tile(seed_a_ptr, rows, first, F, threshold_a, ALIGNED_A, BLOCK_N)
            da = tl.where(keep, da * tl.cast(keep_scale_a, tl.float32), 0.0)
        inner = tl.load(pre + columns, mask=mask, other=0.0).to(tl.float32)
        slope = derivative(inner, FFN_ACTIVATION)
        if GATED:
            z = tl.load(pre + F + columns, mask=mask, other=0.0).to(tl.float32)
            tl.store(d_pre + columns, (da * z * slope).to(low), mask=mask)
            tl.store(place, (da * activate(inner, FFN_ACTIVATION)).to(low), mask=mask)
        else:
            tl.store(place, (da * slope).to(low), mask=mask)
    else:
        first = (tile - tiles_f) * BLOCK_N
        columns = (first + offs)[None, :]
        mask = (rows < M)[:, None] & (columns < R)
        start = 2 * F if GATED else F
        t = tl.load(pre + start + columns, mask=mask, other=0.0).to(tl.float32)
        kept = tl.cast(keep_scale_h, tl.float32)
        if PAD_ONLY:
            outside = (rows < M)[:, None] & (columns >= R) & (columns < R + padding)
            zero = tl.zeros((BLOCK_M, BLOCK_N), low)
            tl.store(d_pre + start + columns, zero, mask=outside)
        elif HAS_DH:
            dt = tl.load(d_pre + start + columns, mask=mask, other=0.0).to(tl.float32)
            dt *= tl.cast(scale, tl.float32) * derivative(t, ACTIVATION)
            if DROP_H:
                keep = keep_tile(seed_h_ptr, rows, first, R, threshold_h, ALIGNED_H, BLOCK_N)
                dt = tl.where(keep, dt * kept, 0.0)
            # columns past R are loaded and written as 0: the padding of the packed rows
            inside = (rows < M)[:, None] & (columns < R + padding)
            tl.store(d_pre + start + columns, dt.to(low), mask=inside)
        if HAS_H:
            h = bottleneck(
                t, seed_h_ptr, rows, first, R, threshold_h, kept,
                ACTIVATION, DROP_H, ALIGNED_H, BLOCK_N,
            )  # fmt: skip
            place = h_ptr + rows[:, None] * stride_hm + columns
            tl.store(place, h.to(h_ptr.dtype.element_ty), mask=mask)


def widened_act(
    pre: Tensor,
    act: Tensor,
    inner: int,
    rank: int,
    *,
    gated: bool,
    ffn_activation: str,
    activation: str,
    dropout_p: float = 0.0,
    activation_dropout_p: float = 0.0,
    seed_h: Tensor | None = None,
    seed_a: Tensor | None = None,
) -> None:
    """Write [drop_a(φ(..)) | drop(f(T)) | 0] to ``act`` (M, inner + rank or more), which may be
    the columns of ``pre`` from ``in`` on."""
    M = pre.shape[0]
    if M == 0:
        return
    tile = pick("widened_ffn", 8 * pre.element_size(), rank, pre.device)
    padding = act.shape[1] - inner - rank
    tiles = cdiv(inner, tile.block_n) + cdiv(rank + padding, tile.block_n)
    widened_act_fwd_kernel[(cdiv(M, tile.block_m) * tiles,)](
        pre, act, seed_h, seed_a, philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        philox.threshold(activation_dropout_p), philox.keep_scale(activation_dropout_p),
        M, inner, rank, padding, pre.stride(0), act.stride(0),
        GATED=gated, FFN_ACTIVATION=ffn_activation, ACTIVATION=activation,
        DROP_H=seed_h is not None, DROP_A=seed_a is not None,
        ALIGNED_H=rank % 8 == 0, ALIGNED_A=inner % 8 == 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.launch,
    )  # fmt: skip


def widened_act_bwd(
    d_pre: Tensor | None,
    pre: Tensor,
    h: Tensor | None,
    inner: int,
    rank: int,
    *,
    gated: bool,
    ffn_activation: str,
    activation: str,
    scale: float,
    dropout_p: float = 0.0,
    activation_dropout_p: float = 0.0,
    seed_h: Tensor | None = None,
    seed_a: Tensor | None = None,
    bottleneck_done: bool = False,
) -> None:
    """Turn [.. | dA | dH | ..] in ``d_pre`` into the gradient of ``pre``; write H to ``h``.

    ``inner=0``: ``pre`` and ``d_pre`` are the bottleneck's alone. Either output may be None.
    ``bottleneck_done``: the columns of ``down`` hold dT already.
    """
    M = pre.shape[0]
    if M == 0:
        return
    tile = pick("widened_ffn", 8 * pre.element_size(), rank, pre.device)
    segments = inner * (2 if gated else 1) + rank
    padding = 0 if d_pre is None else d_pre.shape[1] - segments
    tiles = cdiv(inner, tile.block_n) + cdiv(rank + padding, tile.block_n)
    widened_act_bwd_kernel[(cdiv(M, tile.block_m) * tiles,)](
        pre if d_pre is None else d_pre, pre, h, seed_h, seed_a, scale,
        philox.threshold(dropout_p), philox.keep_scale(dropout_p),
        philox.threshold(activation_dropout_p), philox.keep_scale(activation_dropout_p),
        M, inner, rank, padding, 0 if d_pre is None else d_pre.stride(0), pre.stride(0),
        0 if h is None else h.stride(0),
        GATED=gated, FFN_ACTIVATION=ffn_activation, ACTIVATION=activation,
        HAS_DH=d_pre is not None, HAS_H=h is not None, PAD_ONLY=bottleneck_done,
        DROP_H=seed_h is not None, DROP_A=seed_a is not None,
        ALIGNED_H=rank % 8 == 0, ALIGNED_A=inner % 8 == 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.launch,
    )  # fmt: skip
