"""A step of LoRA and of an adapter by rank: milliseconds of our C++ passes, and of the library.

    python -m benchmarks.rank_passes                     fp32, no dropout
    python -m benchmarks.rank_passes --dtype bfloat16 --dropout 0.1

256 rows, 768 wide, forward and backward. ``passes.PLAIN_RANK`` and ``MASKED_RANK`` say which of
them takes which rank, without and with dropout.
"""

import argparse
from statistics import median
from unittest import mock

import torch

from pelt_fast.ops.common import gemm, passes

from . import edges
from .common import table
from .timing import rounds

RANKS = (8, 16, 32, 64, 96, 128)


def measure(plan: edges.Plan, dropout_p: float, ranks: tuple[int, ...] = RANKS) -> list[list[str]]:
    """One line for each method and rank."""
    lines = []
    for name, make in (("LoRA", edges.lora), ("adapter", edges.adapter)):
        for rank in ranks:
            step = make(plan, plan.rows, rank, dropout_p=dropout_p)
            both = {"C++": _capped(step, passes.MAX_RANK), "library": _capped(step, 0)}
            taken = {k: 1e3 * median(v) for k, v in rounds(both, plan.repeats).items()}
            lines.append([name, str(rank), *(f"{ms:.2f}" for ms in taken.values()),
                          f"{taken['library'] / taken['C++']:.2f}"])  # fmt: skip
    return lines


def _capped(step: edges.Step, most: int) -> edges.Step:
    """The step, where the passes take ranks up to ``most``, whatever is faster."""

    def capped(i: int) -> None:
        with (
            mock.patch.multiple(passes, PLAIN_RANK=most, MASKED_RANK=most),
            mock.patch.object(gemm, "in_16_bits", lambda dtype, device: False),
            mock.patch.object(passes, "MAX_RANK", most),
        ):
            passes.library_is_faster.cache_clear()
            step(i)
        passes.library_is_faster.cache_clear()

    return capped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--dropout", type=float, default=0.0)
    options = parser.parse_args()
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout must be in [0, 1), got {options.dropout}")
    header = ["method", "rank", "C++, ms", "library, ms", "library / C++"]
    plan = edges.Plan(dtype=getattr(torch, options.dtype))
    print(table(header, measure(plan, options.dropout)))
