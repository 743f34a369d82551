"""Times on the device, and its floors: copy bandwidth and the library's GEMM, in the same run."""

import functools
import statistics
import time
from collections.abc import Callable

import torch

FLUSH = 256 << 20  # bytes written before each run: several times an L2 cache
FLUSH_MS = 0.07  # about the time of that write
REPLAYS = 5
REPLAY_MS = 4.0  # of one replay, so that a measurement takes less than 60 ms
COUNTS = (40, 20, 10, 5, 2)  # runs in one graph


def milliseconds(
    function: Callable[[], object], device: torch.device
) -> tuple[float, float, float]:
    """Median, low and high of the device's own time of ``function``, without the host's work for
    the launches and with a cold L2 cache. A function that cannot be captured is timed by
    :func:`eager_milliseconds`."""
    if device.type != "cuda":
        return eager_milliseconds(function, device)
    cold = _cold(torch.cuda.current_device())
    once = cold.warm(function)  # an error of the function itself is the caller's
    try:
        return cold.times(function, once)
    except Exception:  # a function that waits for the host
        _cold.cache_clear()  # the allocator may still hold the pool of the capture that failed
        torch.cuda.synchronize()
        return eager_milliseconds(function, device)


class Cold:
    """CUDA graphs of runs that start with a cold L2 cache, and graphs that only clear the cache.

    Both are replayed, and the difference is the time of the runs. One stream and one memory pool
    serve every capture: the graphs of ``alone`` keep the pool.
    """

    def __init__(self):
        self.buffer = torch.empty(FLUSH // 4, dtype=torch.int32, device="cuda")
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.alone: dict[int, torch.cuda.CUDAGraph] = {}

    def warm(self, function: Callable[[], object], runs: int = 3) -> float:
        """Milliseconds of a run launched from Python, on the stream that captures."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                function()
            start.record()
            for _ in range(runs):
                function()
            end.record()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        return start.elapsed_time(end) / runs

    def times(self, function: Callable[[], object], once: float) -> tuple[float, float, float]:
        """Median, low and high of one run; ``once`` is about how long one takes."""
        fitting = (n for n in COUNTS if n * (once + FLUSH_MS) <= REPLAY_MS)
        count = next(fitting, COUNTS[-1])
        if count not in self.alone:
            self.alone[count] = self._captured(lambda: None, count)
        graphs = self._captured(function, count), self.alone[count]
        # the first replay of a graph loads it
        replays = [[self._replay(graph) for graph in graphs] for _ in range(REPLAYS + 1)][1:]
        flushes = statistics.median(alone for _, alone in replays)
        found = sorted(max(both - flushes, 1e-4) / count for both, _ in replays)
        return statistics.median(found), found[1], found[-2]

    def _captured(self, function: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
        """``count`` times: clear the cache, run. torch.cuda.graph would empty the allocator."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            try:
                for _ in range(count):
                    self.buffer.fill_(1)
                    function()
            finally:
                graph.capture_end()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        """Milliseconds of one replay, queued after other work, without the host's time."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            self.buffer.fill_(1)
            start.record()
            graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)


@functools.cache
def _cold(index: int) -> Cold:
    return Cold()


def eager_milliseconds(
    function: Callable[[], object], device: torch.device
) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of ``function`` launched from Python. For short kernels this
    includes the host's work. The L2 cache is cleared before each run."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(function, warmup=10, rep=60, quantiles=[0.5, 0.2, 0.8]))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), min(times), max(times)


def graph_milliseconds(function: Callable[[], object], device: torch.device) -> float | None:
    """Median of ``function`` replayed as a CUDA graph: the device's own time, without the host's
    work for each launch. None where it cannot be captured, or without a GPU."""
    if device.type != "cuda":
        return None
    from triton.testing import do_bench_cudagraph

    try:
        return do_bench_cudagraph(function, rep=40, return_mode="median")
    except Exception:  # a provider that waits for the host
        torch.cuda.synchronize()
        return None


def floors(device: torch.device, size: int = 1 << 28, side: int = 8192) -> dict[str, float]:
    """GB/s of a copy of ``size`` bf16 elements, TFLOP/s of a bf16 GEMM of side ``side``."""
    x = torch.empty(size, dtype=torch.bfloat16, device=device).normal_()
    y = torch.empty_like(x)
    copy, *_ = milliseconds(lambda: y.copy_(x), device)
    a = torch.randn(side, side, dtype=torch.bfloat16, device=device)
    gemm, *_ = milliseconds(lambda: a @ a, device)
    return {"copy_gb_s": 2 * x.nbytes / copy / 1e6, "gemm_tflop_s": 2 * side**3 / gemm / 1e9}


def floor_milliseconds(bytes_: float, flops: float, floors: dict[str, float]) -> float:
    """The larger of the two floors of a time: by bytes and by flops."""
    return max(bytes_ / floors["copy_gb_s"] / 1e6, flops / floors["gemm_tflop_s"] / 1e9)
