"""Microseconds of the host for small calls: launches, the ops, and a backward in either thread.

    python -m benchmarks.host [--device cuda] [--profile]

On tiny inputs the host's work is the time. On a GPU nothing waits for the device inside a loop, so
that these are the host's own microseconds; "one thread" is backward in the calling thread, not in
autograd's. The median of the repeats. ``--profile`` lists the functions, of Python and of C, in
which the forward and backward of each op spend the time; the profiler makes each call slower.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from pelt_fast import functional

from .common import table
from .record import Record

WIDTH, RANK, PREFIX = 768, 16, 30
LOOPS, REPEATS = 60, 7
LISTED = 45  # functions of a profile
HEADER = ["call", "rows", "inference", "forward", "and backward", "backward in one thread"]
Call = Callable[[torch.Tensor], torch.Tensor]


def microseconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    times = []
    for _ in range(REPEATS + 1):  # the first warms up
        start = time.perf_counter()
        for _ in range(LOOPS):
            function()
        times.append(1e6 * (time.perf_counter() - start) / LOOPS)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return statistics.median(times[1:])


def calls(rows: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple]:
    """Name, input, call: each op beside the frozen layer without it."""

    def randn(*shape: int, of=dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=of)

    def trained(*shape: int) -> torch.Tensor:
        return randn(*shape, of=torch.float32).requires_grad_()

    x, w = randn(rows, WIDTH), randn(WIDTH, WIDTH)
    a, b = trained(RANK, WIDTH), trained(WIDTH, RANK)
    yield "linear", x, lambda x: F.linear(x, w)
    yield "rank product, library", x, lambda x: F.linear(x, a.to(x.dtype))
    yield "LoRA linear", x, lambda x: functional.lora_linear(x, w, None, a, b, scale=2.0)
    q = randn(1, 12, rows, 64)
    k, v, pk, pv = (*(randn(1, 12, rows + 32, 64) for _ in range(2)),
                    *(trained(12, PREFIX, 64) for _ in range(2)))  # fmt: skip
    yield "attention", q, lambda q: F.scaled_dot_product_attention(q, k, v)
    yield "prefix attention", q, lambda q: functional.prefix_attention(q, k, v, pk, pv)
    w1, w2 = randn(4 * WIDTH, WIDTH), randn(WIDTH, 4 * WIDTH)
    yield "FFN", x, lambda x: F.linear(F.gelu(F.linear(x, w1)), w2)
    yield (
        "widened FFN",
        x,
        lambda x: functional.ffn_parallel_adapter(
            x, w1, None, w2, None, a, None, b, None, scale=4.0
        ),
    )


def every(device: torch.device) -> Iterator[dict]:
    """The entries of a decoder's single row, and of a small batch."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for rows in (1, 64):
        yield from measure(rows, device, dtype)


def measure(rows: int, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """One entry a call."""
    for name, x, function in calls(rows, device, dtype):
        leaf = x.clone().requires_grad_()
        dy = torch.ones_like(function(leaf))

        def both(function=function, leaf=leaf, dy=dy) -> None:
            function(leaf).backward(dy)

        with torch.no_grad():
            inference = microseconds(lambda: function(x), device)  # noqa: B023
        forward = microseconds(lambda: function(leaf), device)  # noqa: B023
        found = dict(call=name, rows=rows, inference=inference, forward=forward)
        found["both"] = microseconds(both, device)
        with torch.autograd.set_multithreading_enabled(False):
            found["one_thread"] = microseconds(both, device)
        yield found


def profiles(device: torch.device, rows: int = 64) -> Iterator[dict]:
    """The functions that take the time of an op's forward and backward in one thread, the longest
    first: name, calls a loop, microseconds a loop without and with what they call."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, x, function in calls(rows, device, dtype):
        if name not in ("LoRA linear", "prefix attention", "widened FFN"):
            continue
        leaf = x.clone().requires_grad_()
        dy = torch.ones_like(function(leaf))
        profiler = cProfile.Profile()
        with torch.autograd.set_multithreading_enabled(False):
            function(leaf).backward(dy)
            profiler.enable()
            for _ in range(LOOPS):
                function(leaf).backward(dy)
            profiler.disable()
        yield dict(profile=name, rows=rows, functions=_functions(profiler))


def _functions(profiler: cProfile.Profile) -> list[list]:
    found = []
    for (file, line, name), (_, count, own, whole, _) in pstats.Stats(profiler).stats.items():
        place = name if file == "~" else f"{'/'.join(file.split('/')[-2:])}:{line} {name}"
        found.append([place, count / LOOPS, 1e6 * own / LOOPS, 1e6 * whole / LOOPS])
    return sorted(found, key=lambda each: -each[2])[:LISTED]


def run(record: Record, device: torch.device) -> int:
    """Write every entry and profile down, and print the tables."""
    for entry in every(device):
        record.add(**entry)
    print(report(record.entries))
    for entry in profiles(device):
        record.add(**entry)
        print(profile_report(entry))
    record.finish()
    return 0


def profile_report(entry: dict) -> str:
    """One profile as a table, in microseconds a loop."""
    lines = [[f"{place:.80}", f"{count:g}", f"{own:.1f}", f"{whole:.1f}"]
             for place, count, own, whole in entry["functions"]]  # fmt: skip
    return f"{entry['profile']}\n" + table(["function", "calls", "own", "with calls"], lines)


def report(entries: list[dict]) -> str:
    """The table, in microseconds."""
    columns = ("inference", "forward", "both", "one_thread")
    lines = [[e["call"], str(e["rows"]), *(f"{e[name]:.0f}" for name in columns)] for e in entries]
    return table(HEADER, lines)


def main() -> None:
    """Print the table of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--profile", action="store_true", help="list the functions, not the times")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.profile:
        for entry in profiles(device):
            print(profile_report(entry))
    else:
        print(report(list(every(device))))


if __name__ == "__main__":
    main()
