"""Work in blocks: the pieces the plans share."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pelt_fast.ops import native
from pelt_fast.reference.philox import keep_mask, keep_scale, threshold

# elements of a block: on a CPU one chunk of the dropout mask (2^17 draws of 8), 4 MiB of fp32;
# elsewhere launches cost, and a block only bounds the workspace
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26
MIN_ROWS = 16


def block_elements(device: torch.device) -> int:
    """How many elements are worked on at a time."""
    return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_ELSEWHERE)


def row_blocks(x: Tensor, width: int | None = None) -> Iterator[slice]:
    """Slices that cover the rows of x, each a block of rows of ``width`` (x's own if None)."""
    rows, width = x.shape[0], x.shape[1] if width is None else width
    step = max(MIN_ROWS, block_elements(x.device) // max(width, 1))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def drop_factor(rows: slice, width: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """What a block of rows is multiplied by: 0 or 1 / (1 - p)."""
    if seed.device.type == "cpu" and native.why_missing() is None:
        out = torch.empty(rows.stop - rows.start, width, dtype=dtype)
        return native.dropout_factor(out, threshold(p), keep_scale(p), seed, rows.start * width)
    keep = keep_mask(rows.start * width, rows.stop * width, p, seed)
    return keep.view(-1, width).to(dtype).mul_(keep_scale(p))


def drop_(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of x (M, N) in place; ``seed=None`` leaves it."""
    if seed is not None:
        for rows in row_blocks(x):
            x[rows].mul_(drop_factor(rows, x.shape[1], p, seed, x.dtype))
    return x


def drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of x (M, N) into a new tensor; ``seed=None`` returns x."""
    if seed is None:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows in row_blocks(x):
        torch.mul(x[rows], drop_factor(rows, x.shape[1], p, seed, x.dtype), out=out[rows])
    return out


def fill(grads: list[Tensor], places: Sequence[int], values: Iterable[Tensor | None]) -> None:
    """Put the gradients that were computed in their places."""
    for place, value in zip(places, values, strict=True):
        if value is not None:
            grads[place] = value


def weight_gradient(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ right`` (P, Q) of left (M, P) and right (M, Q), accumulated in at least ``dtype``.

    Low-precision activations are neither rounded in the result nor cast as a whole: CUDA's GEMM
    writes fp32, elsewhere one block of rows at a time is cast.
    """
    if torch.promote_types(left.dtype, dtype) == left.dtype:
        return (left.t() @ right).to(dtype)
    if left.is_cuda and dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=dtype)
    out = torch.zeros(left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    for rows in row_blocks(left, left.shape[1] + right.shape[1]):
        out.addmm_(left[rows].to(dtype).t(), right[rows].to(dtype))
    return out
