"""Methods of several ranks for the tests of the grouped ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from pelt_fast.ops.common.bundles import RoutedDown, RoutedDropout, RoutedUp
from pelt_fast.ops.common.dropout import draw_seed

CPU = torch.device("cpu")
K, N, EACH = 20, 12, 5
RANKS = [1, 3, 16, 100, 0]
SCALES = [2.0, -0.5, 1.0, 0.25, 3.0]
P = [0.3, 0.0, 0.5, 0.1, 0.2]
ROUTES = {
    "sorted": [0, 0, 1, 2, 2, 3],
    "unsorted": [3, 0, -1, 1, 0, 2, 4, 3, 0, 0],
    "none": [-1, -1, 4],
    "one": [2, 2, 2],
    "not all": [3, 0, 3],
    "no rows": [],
}


class Factors(NamedTuple):
    """Of each method: D, d, U, u."""

    downs: list[Tensor]
    down_biases: list[Tensor]
    ups: list[Tensor]
    up_biases: list[Tensor]

    def stacked(self, biases: bool) -> tuple[RoutedDown, RoutedUp]:
        down = RoutedDown(torch.cat(self.downs), torch.cat(self.down_biases) if biases else None)
        up = torch.cat([u.reshape(-1) for u in self.ups])
        return down, RoutedUp(up, torch.stack(self.up_biases) if biases else None)

    def leaves(self, biases: bool) -> list[Tensor]:
        lists = self if biases else (self.downs, self.ups)
        return [leaf for each in lists for leaf in each]


def factors(ranks=RANKS, dtype=torch.float64) -> Factors:
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).div_(max(shape[-1], 1) ** 0.5).requires_grad_()

    return Factors(
        [leaf(r, K) for r in ranks], [leaf(r) for r in ranks], [leaf(N, r) for r in ranks],
        [leaf(N) for _ in ranks],
    )  # fmt: skip


def random(*shape, dtype=torch.float64, needs=True):
    """A sliced view of a larger tensor: rows are strided."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float32)
    return wide.to(dtype)[..., : shape[-1]].detach().requires_grad_(needs)


def drops(p):
    """The dropouts of input and bottleneck, both or neither."""
    if not p:
        return [RoutedDropout([], None)] * 2
    return [RoutedDropout(P, draw_seed(CPU, len(P))) for _ in range(2)]
