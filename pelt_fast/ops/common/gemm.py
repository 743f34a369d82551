"""Products on the library's GEMM.

On a CPU without 16-bit arithmetic the library's 16-bit products take 5 to 160 times as long as
those in fp32 (docs/facts.md#products-of-a-few-rows). There they run in fp32, a block of rows at a
time, and the result is rounded.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import row_blocks


@functools.cache
def computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has arithmetic for a 16-bit dtype, and the library a GEMM that uses it."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def in_16_bits(x: Tensor) -> bool:
    """Whether the library multiplies x in 16-bit arithmetic."""
    return x.element_size() == 2 and (x.device.type != "cpu" or computes_in(x.dtype))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x weightᵀ + bias, in ``out`` if given."""
    if runs_in_fp32(x):
        return _in_fp32(x, weight.t(), bias, 1.0, out)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def product(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x w, in ``out`` if given."""
    if runs_in_fp32(x):
        return _in_fp32(x, w, None, 1.0, out)
    return x @ w if out is None else torch.mm(x, w, out=out)


def add_product(
    base: Tensor, x: Tensor, w: Tensor, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """base + scale x w, in ``out`` if given; it may be ``base``."""
    if runs_in_fp32(x):
        return _in_fp32(x, w, base, scale, out)
    return torch.addmm(base, x, w, alpha=scale, out=out)


def runs_in_fp32(x: Tensor) -> bool:
    """Whether products of x run in fp32."""
    return x.element_size() == 2 and not in_16_bits(x)


def _in_fp32(x: Tensor, w: Tensor, base: Tensor | None, scale: float, out: Tensor | None) -> Tensor:
    """base + scale x w, rounded once; ``base`` (M, N), (N) or None."""
    out = x.new_empty(x.shape[0], w.shape[1]) if out is None else out
    w = w.float()
    for rows in row_blocks(x, max(w.shape)):
        found = x[rows].float() @ w
        if base is None:
            out[rows] = found
        else:
            torch.add(base if base.dim() == 1 else base[rows], found, alpha=scale, out=out[rows])
    return out
