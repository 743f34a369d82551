"""The largest rank at which our kernel beats the library, as the ops run both."""

import math
from collections.abc import Callable, Iterator

import torch

from pelt_fast.kernels.adapter import adapter
from pelt_fast.kernels.config import FUSED_RANK
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.ops.adapter import cpu
from pelt_fast.ops.common.bundles import AdapterNorm, Bottleneck, Transform
from pelt_fast.ops.common.gradients import weight_gradient

from .kernel_case import Sizes

RANKS = (16, 64, 128)
Pair = tuple[Callable[[], object], Callable[[], object]]


def pairs(device: torch.device, sizes: Sizes, dtype) -> Iterator[tuple[str, int, Pair]]:
    """(kernel, rank, (ours, the library's)), without dropout; not above the kernel's own limit."""
    for rank in RANKS:
        for kernel, pair in at_rank(device, sizes, dtype, rank).items():
            if rank <= FUSED_RANK[kernel]:
                yield kernel, rank, pair


def at_rank(device: torch.device, sizes: Sizes, dtype, rank: int) -> dict[str, Pair]:
    """Every kernel on one input."""

    def randn(*shape, of=dtype):
        return torch.randn(*shape, device=device).to(of)

    x, y, h = randn(sizes.m, sizes.k), randn(sizes.m, sizes.k), randn(sizes.m, rank)
    a, b = (randn(*shape, of=torch.float32) for shape in ((rank, sizes.k), (sizes.k, rank)))
    weights = Bottleneck(a, a[:, 0].contiguous(), b, b[:, 0].contiguous())
    transform, norm = Transform("relu", 1.0, 0.0, None), AdapterNorm(None, None, "none")

    def gradients():
        return weight_gradient(y, h, b.dtype).mul_(2.0), (y @ b.to(dtype)).mul_(2.0)

    return {
        "rank_down": (lambda: rank_down(x, a), lambda: x @ a.to(dtype).t()),
        "rank_down_bwd": (
            lambda: rank_down_bwd(h, x, torch.float32), lambda: weight_gradient(h, x, a.dtype),
        ),
        "rank_up": (
            lambda: rank_up(h, b, y, scale=1e-3, out=y),
            lambda: y.addmm_(h, b.to(dtype).t(), alpha=1e-3),
        ),
        "rank_up_bwd": (lambda: rank_up_bwd(y, h, b, scale=2.0), gradients),
        "adapter": (
            lambda: adapter(x, y, *weights),
            lambda: cpu.adapter_forward(x, y, weights, norm, transform, True),
        ),
    }  # fmt: skip


def limit(ratios: dict[int, float], most: int) -> int:
    """The largest rank at which ours is faster, from rank -> our time to the library's. Between a
    faster and a slower rank, it is the rank at which the line through the logarithms crosses 1.
    ``most``: the kernel's own limit, if ours is faster at every rank."""
    won, before = 0, None
    for rank, ratio in sorted(ratios.items()):
        if ratio > 1.0:
            if before is not None:
                share = -math.log(before) / (math.log(ratio) - math.log(before))
                won = int(won * (rank / won) ** share)
            return won
        won, before = rank, ratio
    return most
