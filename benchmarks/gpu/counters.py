"""DRAM bytes of each op: the count of the GPU (ncu) and the count of this project.

Needs Nsight Compute on the path and the right to read counters; says which is missing.
"""

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks import traffic
from benchmarks.common import REPOSITORY, table
from benchmarks.record import Record

from .numerics import environment

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
CASES = ("lora", "adapter", "ffn")
PROVIDERS = ("frozen", "kernels, accumulate", "kernels", "plain PyTorch")


def one(case_index: int, provider: str) -> None:
    """In the profiled process: forward and backward of one provider, once to compile and once
    under the profiler."""
    step = materialised(case_index, provider, torch.device("cuda"))
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    step()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def materialised(case_index: int, provider: str, device: torch.device) -> Callable[[], None]:
    """Forward and backward of a provider whose tensors, counted on the meta device, are real."""
    inputs, function = traffic.cases(CASES)[case_index].providers[provider]
    function = getattr(function, "function", function)
    for tensor in traffic.parameters_of(function):
        if tensor.is_meta:
            real = torch.randn(tensor.shape, device=device).to(tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                real = torch.nn.Parameter(real, tensor.requires_grad)
            torch.utils.swap_tensors(tensor, real)
    leaves = [torch.randn(t.shape, device=device).to(t.dtype).requires_grad_() for t in inputs]
    dy = torch.randn_like(function(*leaves))
    return lambda: function(*leaves).backward(dy)


def counted(case_index: int, provider: str) -> float:
    """DRAM bytes of one provider; RuntimeError with the output of ncu when it gives none."""
    call = f"from benchmarks.gpu.counters import one; one({case_index}, {provider!r})"
    command = ["ncu", "--profile-from-start", "off", "--csv", "--metrics", ",".join(METRICS),
               "--print-units", "base", sys.executable, "-c", call]  # fmt: skip
    ran = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    return total(ran.stdout)


def total(output: str) -> float:
    """The sum over kernels and metrics of ncu's CSV."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    values = [float(row["Metric Value"].replace(",", "")) for row in csv.DictReader(lines)
              if row.get("Metric Name") in METRICS]  # fmt: skip
    if not values:
        raise RuntimeError(" ".join(output.split())[-200:] or "ncu printed nothing")
    return sum(values)


def run(record: Record, device: torch.device) -> int:
    """Every provider that fits the time."""
    if shutil.which("ncu") is None:
        record.finish(absent="ncu is not on the path")
        print("ncu is not on the path: nothing was counted")
        return 0
    rows = []
    for i, case in enumerate(traffic.cases(CASES)):
        for row in traffic.measure(case):
            if row.provider not in PROVIDERS:
                continue
            if not record.in_time:
                record.leave(f"{case.subject}, {row.provider}")
                continue
            unit = 2 * case.pass_elements
            try:
                found = counted(i, row.provider) / unit
            except RuntimeError as error:
                record.add(subject=case.subject, provider=row.provider, failed=str(error))
                rows.append([case.subject, row.provider, f"{row.both:.1f}", str(error)[:80]])
                continue
            record.add(subject=case.subject, provider=row.provider, counted=row.both, dram=found)
            rows.append([case.subject, row.provider, f"{row.both:.1f}", f"{found:.1f}"])
    record.finish()
    print(table(["subject", "provider", "counted, P", "DRAM by ncu, P (weights too)"], rows))
    return 0
