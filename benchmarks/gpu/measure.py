"""Times on the device, and its floors: copy bandwidth and the library's GEMM, in the same run."""

import statistics
import time
from collections.abc import Callable

import torch


def milliseconds(
    function: Callable[[], object], device: torch.device
) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of ``function``; the L2 cache is cleared before each run."""
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
