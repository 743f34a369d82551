"""compute-sanitizer, memcheck and racecheck, on every kernel with small odd shapes."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.common import REPOSITORY

from .kernel_case import Sizes
from .kernel_cases import cases
from .numerics import environment
from .record import Record
from .toolkit import found

TOOLS = ("memcheck", "racecheck")
ERROR = 9  # the exit status of a tool that found something
AT_ONCE = 5  # processes: most of their time is start-up and compiling
SMALL = Sizes(m=200, k=136, inner=264, batch=2, heads=2, queries=70, dim=64)
FAMILIES = ("adapter", "rank_down", "rank_up", "mask_bits", "tail_gemm", "widened", "prefix",
            "routed")  # fmt: skip


def run(record: Record, device: torch.device) -> int:
    """Run each tool on each family of kernels; 1 when one reports an error."""
    program = found("compute-sanitizer")
    if program is None:
        record.finish(skipped="compute-sanitizer is not on this machine")
        print("skipped: compute-sanitizer is not on this machine")
        return 0
    runs = [(tool, family) for tool in TOOLS for family in FAMILIES]
    errors = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for entry in pool.map(lambda each: _one(record, program, *each), runs):
            if "exit" not in entry:
                record.leave(f"{entry['tool']} {entry['family']}")
                continue
            record.add(**entry)
            print(f"{entry['tool']:<10}{entry['family']:<12}{entry['lines'][-1]}", flush=True)
            errors += entry["exit"] == ERROR
    record.finish(errors=errors)
    return 1 if errors else 0


def _one(record: Record, program: str, tool: str, family: str) -> dict:
    """The report of one tool on one family; without ``exit`` if the time was over."""
    about, left = dict(tool=tool, family=family), record.seconds_left
    if left <= 0:
        return about
    command = [program, "--tool", tool, "--error-exitcode", str(ERROR), "--report-api-errors", "no",
               sys.executable, "-m", "benchmarks.gpu.sanitizer", family]  # fmt: skip
    # an allocation each, or an access past the end of a tensor stays inside torch's pool
    alone = {**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ran = subprocess.run(
            command, cwd=REPOSITORY, env=alone, capture_output=True, text=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        return about
    text = (ran.stdout + ran.stderr).strip().splitlines() or ["no output"]
    return dict(**about, exit=ran.returncode, lines=text[:60] if ran.returncode else text[-3:])


def main() -> None:
    """Run each kernel of one family once, under the tool."""
    device = torch.device("cuda")
    for case in cases(device, SMALL):
        if case.kernel.startswith(sys.argv[1]):
            case.ours()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
