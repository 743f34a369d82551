"""The product of rows with a large weight: microseconds of the library's, and of ``passes.linear``.

    python -m benchmarks.few_rows [--width 768] [--depth 3072]

The weight is stored by rows (nn.Linear) or by columns (the packed out-projection of a widened FFN).
A few rows run in C++ (``passes.MAX_FEW``). Many rows are the library's, in fp32 where this CPU has
no arithmetic for the 16-bit dtype. Twelve weights take turns, so that each is read from memory and
not from a cache, as in a decoder's step. The floor of a few rows is the time to read the weight
once.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional as F

from pelt_fast.ops.common import native, passes

from .common import table

ROWS, WEIGHTS, REPEATS = (1, 4, 8, 16, 32, 64), 12, 5
DTYPES = (torch.float32, torch.bfloat16)
HEADER = ["dtype", "rows of x", "weight by", "library", "ours", "ratio"]


def microseconds(function: Callable, weights: list[torch.Tensor]) -> float:
    """Of one product."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for weight in weights:
            function(weight)
        times.append(1e6 * (time.perf_counter() - start) / len(weights))
    return median(times)


@torch.inference_mode()
def measure(depth: int, width: int) -> list[list[str]]:
    """The lines of the table."""
    lines = []
    for dtype in DTYPES:
        by_rows = [torch.randn(width, depth).to(dtype) for _ in range(WEIGHTS)]
        by_columns = [weight.t().contiguous().t() for weight in by_rows]
        bias = torch.randn(width).to(dtype)
        for rows in ROWS:
            x = torch.randn(rows, depth).to(dtype)
            for name, weights in (("rows", by_rows), ("columns", by_columns)):
                library = microseconds(lambda w: F.linear(x, w, bias), weights)  # noqa: B023
                ours = microseconds(lambda w: passes.linear(x, w, bias), weights)  # noqa: B023
                ratio = f"{ours / library:.2f}"
                cells = [f"{library:.0f}", f"{ours:.0f}", ratio]
                lines.append([str(dtype)[6:], str(rows), name, *cells])
    return lines


def main() -> None:
    """Print the table of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=3072, help="K")
    parser.add_argument("--width", type=int, default=768, help="N")
    options = parser.parse_args()
    if min(options.depth, options.width) < 1:
        parser.error("--depth and --width must be at least 1")
    reason = native.why_missing()
    if reason is not None:
        parser.error(f"the C++ ops are missing: {reason}")
    print(table(HEADER, measure(options.depth, options.width)))


if __name__ == "__main__":
    main()
