"""The dropout mask: Philox4x32 with 7 rounds, 8 elements a draw, in plain torch integers.

Definition, the same bits in every backend (docs/maths.md#the-dropout-mask):

* ``seed`` is an int64 tensor ``(key, offset)``, drawn outside the op by :func:`draw_seed`.
* Element ``i`` of the row-major tensor belongs to draw ``i // 8``. The counter of a draw is
  ``(draw & 0xffffffff, draw >> 32, offset & 0xffffffff, offset >> 32)``, the key is
  ``(key & 0xffffffff, key >> 32)``.
* The 128 bits are read as eight 16-bit lanes, little end first; element ``i`` takes lane ``i % 8``
  and is kept when ``lane >= threshold(p)``, where ``threshold(p) = round(p * 65536)``.
* A kept element is multiplied by ``1 / (1 - threshold(p) / 65536)``.

Without a GPU the mask is drawn and applied in blocks of rows that stay in cache.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11); 7 rounds is the
smallest count that passes BigCrush.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import native
from .bundles import Dropout, FFNSettings

ROUNDS = 7
LANES = 8  # elements for each draw of 128 bits
LEVELS = 1 << 16  # p is rounded to a multiple of 1 / LEVELS

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_cpp = native.ops()
# draws in a chunk. On a CPU: enough that torch splits an operation over its threads (from 32 Ki),
# and few enough that the int64 temporaries stay in cache. Elsewhere: many, for few launches
_CHUNK = {"cpu": 1 << 17}
_CHUNK_ELSEWHERE = 1 << 22


# elements of a block. On a CPU: one chunk of the dropout mask (2^17 draws of 8), 4 MiB of fp32.
# Elsewhere: many, for few launches; a block only bounds the workspace
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 26
MIN_ROWS = 16


class _Source(threading.local):
    """Where a thread's seeds come from: a function of their count, or None: torch's generator."""

    draw: Callable[[int], Tensor] | None = None


_source = _Source()


@contextlib.contextmanager
def seeds_from(draw: Callable[[int], Tensor]) -> Iterator[None]:
    """In this block the seeds of this thread are what ``draw(count)`` gives, (count, 2)."""
    before, _source.draw = _source.draw, draw
    try:
        yield
    finally:
        _source.draw = before


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """Draw ``count`` seeds from torch's generator: int64, shape (count, 2), rows (key, offset).

    Called outside the op, so that recomputation under checkpointing, torch.compile and CUDA
    graphs use the same seed. On an accelerator nothing is synchronised.
    """
    if not torch.compiler.is_compiling() and _source.draw is not None:
        return _source.draw(count).to(device)
    return torch.randint(0, 2**63 - 1, (count, 2), dtype=torch.int64, device=device)


def draw_seeds(x: Tensor, training: bool, *probabilities: float) -> Tensor | None:
    """A seed for each dropout of an op on ``x`` (count, 2), or None when none of them acts."""
    if not training or not any(drops(p) for p in probabilities):
        return None
    return draw_seed(x.device, len(probabilities))


def seed_row(seed: Tensor | None, row: int, p: float) -> Tensor | None:
    """The seed of one of several dropouts, None if it does not act."""
    return None if seed is None or p == 0 else seed.select(0, row)


def ffn_dropouts(settings: FFNSettings) -> tuple[Dropout, Dropout, Dropout]:
    """The three dropouts of a widened block: bottleneck, activation, output."""
    probabilities = settings.dropout_p, settings.activation_dropout_p, settings.output_dropout_p
    hidden, inner, output = (
        Dropout(p, seed_row(settings.seed, row, p)) for row, p in enumerate(probabilities)
    )
    return hidden, inner, output


def drops(p: float) -> bool:
    """Whether any lane is dropped: ``threshold(p) > 0``, without a cache, which torch.compile warns
    of."""
    return p * LEVELS > 0.5


@functools.cache
def threshold(p: float) -> int:
    """The smallest 16-bit lane that is kept at dropout probability ``p``."""
    return min(round(p * LEVELS), LEVELS - 1)


@functools.cache
def keep_scale(p: float) -> float:
    """``1 / (1 - p)`` from the rounded ``p``."""
    return LEVELS / (LEVELS - threshold(p))


def philox4x32(counter: list[Tensor], key: list[Tensor], rounds: int = ROUNDS) -> list[Tensor]:
    """Four int64 tensors whose low 32 bits are the random words of ``counter`` under ``key``.

    ``counter`` (4) and ``key`` (2) hold values below 2**32; shapes broadcast. A product of two
    32-bit numbers wraps in int64, but its 64 bits are the right ones.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0 = ((product1 >> 32) ^ (c1 ^ k0)).bitwise_and_(_LOW)
        c2 = ((product0 >> 32) ^ (c3 ^ k1)).bitwise_and_(_LOW)
        c1, c3 = product1, product0  # only their low 32 bits are read
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def keep_mask(start: int, stop: int, p: float, seed: Tensor) -> Tensor:
    """The mask of elements ``start`` to ``stop`` of the row-major tensor: bool, True is kept."""
    first, last = start // LANES, -(-stop // LANES)
    words = torch.empty((last - first, 4), dtype=torch.int32, device=seed.device)
    key, offset = seed[0], seed[1]
    key = [key & _LOW, (key >> 32) & _LOW]
    offset = [offset & _LOW, (offset >> 32) & _LOW]
    chunk = _CHUNK.get(seed.device.type, _CHUNK_ELSEWHERE)
    for begin in range(first, last, chunk):
        end = min(begin + chunk, last)
        draw = torch.arange(begin, end, dtype=torch.int64, device=seed.device)
        counter = [draw & _LOW, draw >> 32, *offset]
        for word, value in enumerate(philox4x32(counter, key)):
            words[begin - first : end - first, word] = value
    # lanes are unsigned: shift them and the threshold into the range of int16
    lanes = words.view(torch.int16).add_(-LEVELS // 2)
    keep = lanes >= threshold(p) - LEVELS // 2
    return keep.view(-1)[start - first * LANES : stop - first * LANES]


def dropout(x: Tensor, p: float, seed: Tensor | None, start: int = 0) -> Tensor:
    """``x`` with dropped elements set to zero and the rest scaled; its own transpose for gradients.

    ``seed`` is one row of :func:`draw_seed`; ``start`` is the row-major index of ``x``'s first
    element when ``x`` is a block of rows of a larger tensor. ``seed=None`` returns ``x``.
    """
    if seed is None:
        return x
    keep = keep_mask(start, start + x.numel(), p, seed).view(x.shape)
    return torch.where(keep, x, 0) * keep_scale(p)


def block_elements(device: torch.device) -> int:
    """How many elements are worked on at a time."""
    return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_ELSEWHERE)


def row_blocks(x: Tensor, width: int | None = None) -> Iterator[slice]:
    """Slices that cover the rows of x, each a block of rows of ``width`` (x's own if None)."""
    rows, width = x.shape[0], x.shape[1] if width is None else width
    step = max(MIN_ROWS, block_elements(x.device) // max(width, 1))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def dropout_factor(out: Tensor, threshold: int, scale: float, seed: Tensor, start: int) -> Tensor:
    """Fill ``out`` (contiguous, CPU) with ``scale`` where the mask keeps an element, else 0, from
    element ``start`` on, in C++ (csrc/cpu/philox.cpp)."""
    return _cpp.dropout_factor_(out, threshold, scale, seed, start)


def drop_factor(rows: slice, width: int, p: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of each element of a block of rows: 0 or 1 / (1 - p)."""
    if seed.device.type == "cpu" and native.why_missing() is None:
        out = torch.empty(rows.stop - rows.start, width, dtype=dtype)
        return dropout_factor(out, threshold(p), keep_scale(p), seed, rows.start * width)
    keep = keep_mask(rows.start * width, rows.stop * width, p, seed)
    return keep.view(-1, width).to(dtype).mul_(keep_scale(p))


def cpp_mask(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """The arguments of the C++ code for a dropout mask."""
    return (None, 0, 1.0) if seed is None else (seed, threshold(p), keep_scale(p))


def drop_(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout of x (M, N) in place; ``seed=None`` leaves x unchanged."""
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
