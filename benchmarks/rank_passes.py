"""A step of LoRA and of an adapter by rank: milliseconds of our C++ passes, and of the library.

    python -m benchmarks.rank_passes

256 rows, 768 wide, fp32, no dropout, forward and backward. The library takes over where the passes
are told that they take no rank.
"""

from statistics import median

from pelt_fast.ops.common import gradients, passes

from . import edges
from .common import table
from .timing import rounds

RANKS = (8, 16, 32, 64, 96, 128)


def measure(plan: edges.Plan, ranks: tuple[int, ...] = RANKS) -> list[list[str]]:
    """One line for each method and rank."""
    lines = []
    for name, make in (("LoRA", edges.lora), ("adapter", edges.adapter)):
        for rank in ranks:
            step = make(plan, plan.rows, rank)
            both = {"C++": _capped(step, passes.MAX_RANK), "library": _capped(step, 0)}
            taken = {k: 1e3 * median(v) for k, v in rounds(both, plan.repeats).items()}
            lines.append([name, str(rank), *(f"{ms:.2f}" for ms in taken.values()),
                          f"{taken['library'] / taken['C++']:.2f}"])  # fmt: skip
    return lines


def _capped(step: edges.Step, most: int) -> edges.Step:
    """The step, where the passes take ranks up to ``most``."""

    def capped(i: int) -> None:
        before = passes.MAX_RANK
        passes.MAX_RANK = gradients.MAX_RANK = most
        try:
            step(i)
        finally:
            passes.MAX_RANK = gradients.MAX_RANK = before

    return capped


if __name__ == "__main__":
    header = ["method", "rank", "C++, ms", "library, ms", "library / C++"]
    print(table(header, measure(edges.Plan())))
