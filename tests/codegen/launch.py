"""What every family of launches is made of: a call with a name, sizes, tensors that nobody touches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from pelt_fast.kernels.config import rows

M, K, N, F = 8192, 4096, 4096, 14336
RANKS = (4, 8, 16, 64, 512)
P = 0.1


@dataclass(frozen=True)
class Launch:
    """One call of a launcher; ``streaming``: its kernels should move 16 bytes an access."""

    name: str
    call: Callable[[], object]
    streaming: bool = False


def empty(*shape, dtype=torch.bfloat16):
    """Memory that is never touched."""
    return torch.empty(*shape, dtype=dtype)


SEED = torch.empty(2, dtype=torch.int64)


def reachable(kernel: str, target: str, bits: int) -> Iterator[int]:
    """A size in each row of the table that ``target`` can reach, as ``config.pick`` looks."""
    seen = 0
    for arch in (target, "any"):
        for row in rows(kernel, arch):
            if row.bits == bits and row.limit > seen:
                yield row.limit
                seen = row.limit
