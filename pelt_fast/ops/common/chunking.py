"""Work in blocks of rows: how large a block is, and dropout block by block."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from . import native
from .dropout import keep_mask, keep_scale, threshold

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


def fill(grads: list[Tensor], indices: Sequence[int], values: Iterable[Tensor | None]) -> None:
    """Put the gradients that were computed where they belong."""
    for index, value in zip(indices, values, strict=True):
        if value is not None:
            grads[index] = value
