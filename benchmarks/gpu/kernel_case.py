"""A kernel on one input, and the sizes of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common import dropout as philox

P = 0.1


@dataclass(frozen=True)
class Sizes:
    """Shapes of the cases; the defaults are those of the targets."""

    m: int = 8192
    k: int = 4096
    inner: int = 14336
    batch: int = 16
    heads: int = 16
    queries: int = 1024
    dim: int = 64
    ranks: tuple[int, ...] = (16, 64)
    prefixes: tuple[int, ...] = (30, 200)


@dataclass(frozen=True)
class KernelCase:
    """``ours()`` and ``plain(drop)`` return the same tensors; ``drop(x, row)`` is the dropout."""

    kernel: str
    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[Callable], tuple[Tensor, ...]]
    bytes: float
    flops: float


def same_mask(seed: Tensor) -> Callable:
    """The dropout of the definition, for the check."""
    return lambda x, p: philox.dropout(x, p, seed)


def torchs(x: Tensor, p: float) -> Tensor:
    """torch's own dropout, for the time."""
    return F.dropout(x, p)


def drawn(device, dtype) -> Callable[..., Tensor]:
    """Random numbers of these shapes; ``of``: another dtype."""
    return lambda *shape, of=dtype: torch.randn(*shape, device=device).to(of)
