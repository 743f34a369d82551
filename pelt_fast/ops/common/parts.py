"""The rows of a batch by method: what the routed ops walk through."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bundles import RoutedDropout, Segments
from .dropout import drops


class Part(NamedTuple):
    """Consecutive rows of one method.

    ``first`` is the first row of its D_g among the D_g below each other; ``own`` is the first of
    these rows among the method's own rows.
    """

    rows: slice
    method: int
    own: int
    first: int
    rank: int

    @property
    def ranks(self) -> slice:
        """Its rows among the D_g below each other."""
        return slice(self.first, self.first + self.rank)

    def up(self, stacked: Tensor, outputs: int) -> Tensor:
        """U_g (N, R_g), a view of the flattened U_g behind each other."""
        place = slice(outputs * self.first, outputs * (self.first + self.rank))
        return stacked[place].view(outputs, self.rank)


def parts_of(where: Segments, most_rows: int | None = None) -> Iterator[Part]:
    """The segments that have work to do, in their order, each in parts of at most ``most_rows``."""
    firsts = first_rows(where.ranks)
    for row, rows, method, own in where.segments.tolist():
        if method < 0 or where.ranks[method] == 0:
            continue
        for done in range(0, rows, most_rows or max(rows, 1)):
            count = min(most_rows or rows, rows - done)
            start = row + done
            yield Part(
                slice(start, start + count), method, own + done, firsts[method],
                where.ranks[method],
            )  # fmt: skip


def first_rows(ranks: Sequence[int]) -> list[int]:
    """The first row of each D_g among the D_g below each other."""
    firsts, total = [], 0
    for rank in ranks:
        firsts.append(total)
        total += rank
    return firsts


# without a limit, because a CUDA graph holds their addresses
@functools.cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host on the device; copied once for equal numbers."""
    return torch.tensor(values, dtype=dtype, device=device)


def drop_of(drop: RoutedDropout, method: int) -> tuple[float, Tensor | None]:
    """The probability and the seed of a method's dropout; the seed is None if it does not act."""
    if drop.seeds is None or not drops(drop.probabilities[method]):
        return 0.0, None
    return drop.probabilities[method], drop.seeds[method]


def widest(ranks: Sequence[int]) -> int:
    """R_max, the width of T."""
    return max(ranks, default=0)


def accumulator(shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros in the wider of ``like``'s dtype and ``dtype``, for a sum over parts."""
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, dtype))
