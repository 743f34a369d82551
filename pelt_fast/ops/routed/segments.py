"""Which rows run which method, from one number for each row of the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common.bundles import Segments


def segments_of(routes: Tensor, rows: int, ranks: Sequence[int]) -> Segments:
    """The segments of ``rows`` rows, of which each entry of ``routes`` has an equal share.

    They are sorted by method. Nothing is read from the device: there are as many segments as
    routes. On a CPU, outside torch.compile, neighbours of one method are one segment, and rows of
    none have no segment.

    Args:
        routes: the method of each row of the batch (B) int64, -1 for none.
        rows: M, a multiple of B: ``rows // B`` consecutive rows belong to each row of the batch.
        ranks: the rank of each method, 0 for one that has nothing here.

    Returns:
        The segments, on the device of ``routes``.
    """
    batch = routes.shape[0]
    each = rows // max(batch, 1)
    methods, order = torch.sort(routes, stable=True)
    place = torch.arange(batch, device=routes.device)
    own = place - torch.searchsorted(methods, methods)  # how many of its rows come before
    if routes.device.type == "cpu" and not torch.compiler.is_compiling():
        return Segments(_merged(methods, order, own, each, ranks), list(ranks))
    found = torch.stack((order * each, torch.full_like(order, each), methods, own * each), 1)
    return Segments(found, list(ranks))


def _merged(methods: Tensor, order: Tensor, own: Tensor, each: int, ranks: Sequence[int]) -> Tensor:
    """The segments, without those of none, and neighbours of one method as one."""
    kept: list[list[int]] = []
    for method, row, first in zip(methods.tolist(), order.tolist(), own.tolist(), strict=True):
        if method < 0 or ranks[method] == 0:
            continue
        if kept and kept[-1][2] == method and kept[-1][0] + kept[-1][1] == row * each:
            kept[-1][1] += each
        else:
            kept.append([row * each, each, method, first * each])
    return torch.tensor(kept, dtype=torch.int64).view(-1, 4)
