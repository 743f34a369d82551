"""Time of several steps that take turns: drift and other load on the machine are equal for all.

A step is called with the number of its round, so that it can use inputs that are in no cache. On a
GPU a round begins with a write that is larger than the L2 cache, so that the host runs ahead of the
device; events take the time after it.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Step = Callable[[int], object]
DEFAULT_CACHE = 32 << 20
MOST_COPIES = 6


def rounds(
    steps: dict[str, Step], repeats: int, warmup: int = 2, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds of every repeat of each step; the steps take turns."""
    clock = clock_of(device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    for i in range(warmup + repeats):
        for name, step in steps.items():
            seconds = clock(step, i, device)
            if i >= warmup:
                times[name].append(seconds)
    return times


def clock_of(device: torch.device | None) -> Callable[[Step, int, torch.device | None], float]:
    """What takes the seconds of one call of a step."""
    return _event_clock if device is not None and device.type == "cuda" else _host_clock


def _host_clock(step: Step, i: int, device) -> float:
    start = time.perf_counter()
    step(i)
    return time.perf_counter() - start


def _event_clock(step: Step, i: int, device) -> float:
    torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(i)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """The 25 %, 50 % and 75 % quantile."""
    if len(values) < 2:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def ratios(values: list[float], floor: list[float]) -> list[float]:
    """The ratio of each repeat to the floor in the same round."""
    return [a / b for a, b in zip(values, floor, strict=True)]


def cache_bytes(device: torch.device) -> int:
    """The last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    try:
        return max(int(size.read_text().strip().rstrip("K")) << 10 for size in sizes)
    except (ValueError, OSError):
        return DEFAULT_CACHE


def copies(tensors: tuple, device: torch.device) -> list[tuple]:
    """Enough copies of the inputs that the first one is out of the cache after the last one was
    read. On a GPU one is enough: a write clears the cache."""
    if device.type == "cuda":
        return [tensors]
    size = sum(t.nbytes for t in tensors)
    count = min(MOST_COPIES, 1 + math.ceil(cache_bytes(device) / max(size, 1)))
    return [tensors] + [tuple(torch.clone(t) for t in tensors) for _ in range(count - 1)]
