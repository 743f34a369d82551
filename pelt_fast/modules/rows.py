"""Which rows of a matrix a part of it has."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Rows:
    """The rows from ``first`` to ``last`` of each ``period`` of a matrix of ``outputs`` rows. They
    are numbers, no tensor of indices: nothing has to be moved to the matrix."""

    first: int
    last: int
    period: int
    outputs: int

    @property
    def count(self) -> int:
        """How many rows there are."""
        return (self.last - self.first) * (self.outputs // self.period)

    @property
    def index(self) -> slice | Tensor:
        """What a tensor of ``outputs`` rows is indexed with: a slice where there is one period."""
        if self.period == self.outputs:
            return slice(self.first, self.last)
        starts = torch.arange(0, self.outputs, self.period)
        return (starts[:, None] + torch.arange(self.first, self.last)).flatten()

    def of(self, whole: Tensor) -> Tensor:
        """These rows of a tensor of ``outputs`` rows."""
        if self.period == self.outputs:
            return whole[self.first : self.last]
        return whole.unflatten(0, (-1, self.period))[:, self.first : self.last].flatten(0, 1)

    def among_zeros(self, part: Tensor) -> Tensor:
        """A matrix (count, R) in its rows of a matrix (outputs, R) of zeros."""
        around = (0, 0, self.first, self.period - self.last)
        if self.period == self.outputs:
            return F.pad(part, around)
        parts = part.unflatten(0, (-1, self.last - self.first))
        return F.pad(parts, around).flatten(0, 1)


def rows_named(name: str, outputs: int) -> Rows:
    """The rows that "i/n", "a-b" or "a-b%p" names in a matrix of ``outputs`` rows."""
    if "/" in name:
        index, count = map(int, name.split("/"))
        size = outputs // count
        return Rows(index * size, (index + 1) * size, outputs, outputs)
    numbers, _, period = name.partition("%")
    first, last = map(int, numbers.split("-"))
    if period and outputs % int(period):
        raise ValueError(
            f"rows {name!r} of a matrix of {outputs} rows: its rows are no multiple of {period}"
        )
    return Rows(first, last, int(period or outputs), outputs)
