"""What the library's GEMM does with 16-bit numbers.

On a CPU without 16-bit arithmetic its 16-bit products take 5 to 160 times as long as those in fp32
(docs/facts.md#products-of-a-few-rows). There ours run in fp32, a block of rows at a time, and the
result is rounded.
"""

import functools

import torch
from torch import Tensor

from .dropout import row_blocks


@functools.cache
def in_16_bits(dtype: torch.dtype, device: str) -> bool:
    """Whether a 16-bit dtype is multiplied in its own arithmetic on this type of device."""
    if dtype.itemsize != 2 or device != "cpu":
        return dtype.itemsize == 2
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


@functools.cache
def runs_in_fp32(dtype: torch.dtype, device: str) -> bool:
    """Whether our products of this dtype run in fp32."""
    return dtype.itemsize == 2 and not in_16_bits(dtype, device)


def writes_fp32(device: str) -> bool:
    """Whether the GEMM of 16-bit numbers can write its sums in fp32 on this type of device."""
    return device == "cuda"


def product_in_fp32(
    x: Tensor, w: Tensor, out: Tensor | None = None, base: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """base + scale x w, rounded once, in ``out`` if given; ``base`` (M, N), (N) or None."""
    out = x.new_empty(x.shape[0], w.shape[1]) if out is None else out
    w = w.float()
    for rows in row_blocks(x, max(w.shape)):
        found = x[rows].float() @ w
        if base is None:
            out[rows] = found
        else:
            torch.add(base if base.dim() == 1 else base[rows], found, alpha=scale, out=out[rows])
    return out
