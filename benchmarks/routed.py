"""Many methods in one batch: the time of the grouped ops over that of one method on the same rows.

    python -m benchmarks.routed [--width 768] [--dtype float32] [--threads 1] [--repeats 60]

One method is LoRA beside a layer (``lora_beside``), the others are the grouped ops on the same x,
with 1, 4 and 32 methods of the same rank. The layer's output is given: its own time is in neither.
"sorted": rows of one method are neighbours; "mixed": they are not. 1,024 rows are 16 sequences (32
with 32 methods); 32 rows are a step of a decoder, a row a sequence. The fastest of the repeats, in
microseconds, and ratios of it.

The floor is bytes: x and base are read and y is written once, whatever the number of methods. G
methods read G times the factors of one: for 32 of rank 64 that is twice x at 1,024 rows, and 64
times x at 32.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from pelt_fast.ops.beside.op import lora_beside
from pelt_fast.ops.common.bundles import (
    LowRank,
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
)
from pelt_fast.ops.routed.op import routed_update
from pelt_fast.ops.routed.segments import segments_of

from .common import table
from .timing import Step, rounds

RANKS, METHODS = (8, 16, 64), ((1, "sorted"), (4, "sorted"), (4, "mixed"), (32, "sorted"),
                               (32, "mixed"))  # fmt: skip
SCALE = 2.0


def routes_of(rows: int, methods: int, order: str) -> Tensor:
    """The method of each sequence of the batch."""
    sequences = rows if rows <= 32 else max(16, methods)
    routes = torch.arange(sequences) % methods
    if order == "sorted":
        return routes.sort()[0]
    return routes[torch.randperm(sequences, generator=torch.Generator().manual_seed(1))]


def steps(rows: int, rank: int, width: int, dtype: torch.dtype, backward: bool) -> dict[str, Step]:
    """One method, and the grouped ops, on the same tensors."""
    torch.manual_seed(0)
    x, base, dy = (torch.randn(rows, width).to(dtype) for _ in range(3))
    x.requires_grad_(backward)

    def finished(y: Tensor) -> None:
        if backward:
            y.backward(dy)
            x.grad = None

    def one(factors: tuple[Tensor, Tensor]) -> Step:
        settings = LowRank(*factors, SCALE)
        return lambda i: finished(lora_beside(lambda x: base, x, settings, 0.0, True))

    def many(count: int, order: str, factors: tuple[Tensor, Tensor]) -> Step:
        where = segments_of(routes_of(rows, count, order), rows, [rank] * count)
        down, up = RoutedDown(factors[0], None), RoutedUp(factors[1], None)
        transform, drop = RoutedTransform("identity", [SCALE] * count), RoutedDropout([], None)
        return lambda i: finished(
            routed_update(x, lambda x: base, down, up, where, transform, drop, drop)
        )

    def factors(count: int, *up: int) -> tuple[Tensor, Tensor]:
        pair = torch.randn(count * rank, width) / width**0.5, torch.randn(*up)
        return tuple(t.requires_grad_(backward) for t in pair)

    found = {"one": one(factors(1, width, rank))}
    for count, order in METHODS:
        stacked = factors(count, count * width * rank)
        found[f"{count} {order}"] = many(count, order, stacked)
    return found


def measure(width: int, dtype: torch.dtype, repeats: int) -> Iterator[list[str]]:
    """The lines of the table."""
    for rows in (1024, 32):
        for rank in RANKS:
            for backward in (False, True):
                with torch.set_grad_enabled(backward):
                    times = rounds(steps(rows, rank, width, dtype, backward), repeats)
                best = {name: min(seconds) for name, seconds in times.items()}
                ratios = [f"{best[name] / best['one']:.2f}" for name in best if name != "one"]
                what = "and backward" if backward else "forward"
                yield [str(rows), str(rank), what, f"{1e6 * best['one']:.0f}", *ratios]


def main() -> None:
    """Print the table of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768, help="K and N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=60)
    options = parser.parse_args()
    if min(options.width, options.threads, options.repeats) < 1:
        parser.error("--width, --threads and --repeats must be at least 1")
    torch.set_num_threads(options.threads)
    header = ["rows", "rank", "", "one method", *(f"{n} {order}" for n, order in METHODS)]
    lines = measure(options.width, getattr(torch, options.dtype), options.repeats)
    print(table(header, list(lines)))


if __name__ == "__main__":
    main()
