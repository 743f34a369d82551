"""compute-sanitizer, memcheck and racecheck, on every kernel with small odd shapes."""

import subprocess
import sys

import torch

from benchmarks.common import REPOSITORY

from .kernel_cases import Sizes, cases
from .numerics import environment
from .record import Record
from .toolkit import found

TOOLS = ("memcheck", "racecheck")
SMALL = Sizes(m=200, k=136, inner=264, batch=2, heads=2, queries=70, dim=64)
FAMILIES = ("adapter", "rank_down", "rank_up", "mask_bits", "tail_gemm", "widened", "prefix")


def run(record: Record, device: torch.device) -> int:
    """Run each tool on each family of kernels; 1 when one reports an error."""
    program = found("compute-sanitizer")
    if program is None:
        record.finish(skipped="compute-sanitizer is not on this machine")
        print("skipped: compute-sanitizer is not on this machine")
        return 0
    errors = 0
    for tool in TOOLS:
        for family in FAMILIES:
            if not record.in_time:
                record.leave(f"{tool} {family}")
                continue
            command = [program, "--tool", tool, "--error-exitcode", "9",
                       sys.executable, "-m", "benchmarks.gpu.sanitizer", family]  # fmt: skip
            try:
                ran = subprocess.run(
                    command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
                    timeout=max(30.0, record.seconds / 4),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                record.leave(f"{tool} {family}: past its time")
                continue
            text = (ran.stdout + ran.stderr).strip().splitlines()
            record.add(tool=tool, family=family, exit=ran.returncode, last=text[-3:])
            print(f"{tool:<10}{family:<12}{text[-1] if text else ''}", flush=True)
            errors += ran.returncode == 9
    record.finish(errors=errors)
    return 1 if errors else 0


def main() -> None:
    """Run each kernel of one family once, under the tool."""
    device = torch.device("cuda")
    for case in cases(device, SMALL):
        if case.kernel.startswith(sys.argv[1]):
            case.ours()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
