"""An activation, forward and backward: nanoseconds an element of the library's and of the C++ ops.

    python -m benchmarks.activations [--rows 1024] [--width 3072]

No gate and no dropout: the C++ ops do those in the same pass, the library in one more each. The
results are written to a tensor that exists. The floor is the memory: in fp32 8 bytes an element
forward, 12 backward. ``passes.LIBRARY_IS_FASTER`` is its conclusion.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from pelt_fast.ops.common import gradients, native, passes
from pelt_fast.ops.common.activations import ACTIVATIONS

from .common import table

DTYPES, REPEATS = (torch.float32, torch.bfloat16, torch.float16), 15
HEADER = ["dtype", "activation", "library", "ours", "ratio", "library's backward", "ours", "ratio"]
NAMES = ("relu", "gelu", "gelu_tanh", "silu", "tanh")


def nanoseconds(calls: dict[str, Callable], d: torch.Tensor) -> dict[str, float]:
    """Of one element, median; the calls take turns. Each may write over a copy of d."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            copy = d.clone()
            start = time.perf_counter()
            call(copy)
            times[name].append(1e9 * (time.perf_counter() - start) / d.numel())
    return {name: median(each) for name, each in times.items()}


@torch.inference_mode()
def measure(rows: int, width: int) -> list[list[str]]:
    """The lines of the table."""
    lines = []
    for dtype in DTYPES:
        x, d = torch.randn(2, rows, width).to(dtype)
        for name in NAMES:
            found = nanoseconds(_calls(name, x), d)
            cells = [f"{found[key]:.2f}" for key in found]
            ratios = [found["ours"] / found["library"], found["our backward"] / found["backward"]]
            cells[2:2], cells[5:] = [f"{ratios[0]:.2f}"], [f"{ratios[1]:.2f}"]
            lines.append([str(dtype)[6:], name, *cells])
    return lines


def _calls(name: str, x: torch.Tensor) -> dict[str, Callable]:
    cpp, number = native.ops(), ACTIVATIONS.index(name)
    return {
        "library": lambda d: passes.library_activate(name, x, d),
        "ours": lambda d: cpp.activate_(d, x, None, number, None, 0, 1.0),
        "backward": lambda d: gradients.library_backward(name, d, x),
        "our backward": lambda d: cpp.activate_backward_(d, x, None, None, number, None, 0, 1.0),
    }


def main() -> None:
    """Print the table of this machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=3072)
    options = parser.parse_args()
    if min(options.rows, options.width) < 1:
        parser.error("--rows and --width must be at least 1")
    reason = native.why_missing()
    if reason is not None:
        parser.error(f"the C++ ops are missing: {reason}")
    print(table(HEADER, measure(options.rows, options.width)))


if __name__ == "__main__":
    main()
