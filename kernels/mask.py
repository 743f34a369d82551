"""The dropout mask alone: one bit for each element, for a backward that reads it twice; or applied.

Shapes   bits (M, N / 8) uint8, low bit first, N a multiple of 8; x, out (M, N), bias (N).
Maths    bit i of byte j of row m = keep[m, 8 j + i], of ``pelt_fast.ops.common.dropout``
         dropout: out = drop(x) + s bias, in place or not
Traffic  writes M N / 8 bytes, 1/16 of a 16-bit activation. The cost is 60 integer operations a
         byte, once instead of in each kernel that reads the mask. dropout: 2 M N.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pelt_fast.kernels.common import draw_bits, keep_tile
from pelt_fast.kernels.config import cdiv
from pelt_fast.kernels.launch import launched
from pelt_fast.ops.common import dropout as philox

BLOCK = 1024


@launched
@triton.jit
def mask_bits_kernel(seed_ptr, bits_ptr, threshold, count, BLOCK: tl.constexpr):
    draw = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = draw_bits(seed_ptr, draw, threshold)
    tl.store(bits_ptr + draw, bits.to(tl.uint8), mask=draw < count)


def mask_bits(seed: Tensor, p: float, rows: int, width: int) -> Tensor:
    """Return the mask of a (rows, width) tensor at dropout probability ``p`` as bits."""
    bits = torch.empty(rows, width // 8, dtype=torch.uint8, device=seed.device)
    if bits.numel():
        grid = (cdiv(bits.numel(), BLOCK),)
        mask_bits_kernel[grid](seed, bits, philox.threshold(p), bits.numel(), BLOCK=BLOCK)
    return bits


@launched
@triton.jit
def dropout_kernel(
    x_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    scale,
    threshold,
    keep_scale,
    M,
    N,
    stride_xm,
    stride_om,
    HAS_BIAS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    columns = (first + tl.arange(0, BLOCK_N))[None, :]
    mask = (rows < M)[:, None] & (columns < N)
    x = tl.load(x_ptr + rows[:, None] * stride_xm + columns, mask=mask, other=0.0)
    keep = keep_tile(seed_ptr, rows, first, N, threshold, ALIGNED, BLOCK_N)
    out = tl.where(keep, x.to(tl.float32) * tl.cast(keep_scale, tl.float32), 0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        out += bias * tl.cast(scale, tl.float32)
    place = out_ptr + rows[:, None] * stride_om + columns
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask)


def dropout(
    x: Tensor,
    p: float,
    seed: Tensor | None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Return drop(x) + scale bias of x (M, N), in ``out`` (x itself: in place) or a new tensor.

    ``seed=None``, which goes with neither bias nor out, returns x. One read, one write.
    """
    if seed is None:
        return x
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    M, N = x.shape
    if out.numel():
        grid = (cdiv(M, 4), cdiv(N, 512))
        dropout_kernel[grid](
            x, bias, seed, out, scale, philox.threshold(p), philox.keep_scale(p), M, N,
            x.stride(0), out.stride(0), HAS_BIAS=bias is not None, ALIGNED=N % 8 == 0,
            BLOCK_M=4, BLOCK_N=512,
        )  # fmt: skip
    return out
