"""The CUDA C++ kernels of csrc/cuda/ without torch: nvcc builds the driver, which checks every
result against fp64 on the host, prints time beside its floor, and runs under compute-sanitizer."""

import subprocess
import tempfile
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY

from .record import Record
from .toolkit import found

SOURCES = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))


def compile_driver(nvcc: str, architecture: str, to: Path) -> subprocess.CompletedProcess:
    """Build the driver for one architecture ("sm_90a")."""
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        f"-arch={architecture}",
        *map(str, SOURCES),
        "-o",
        str(to),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def run(record: Record, device: torch.device) -> int:
    """Build it, run it, and run it under memcheck; 1 when a result or the tool is not content."""
    nvcc, sanitizer = found("nvcc"), found("compute-sanitizer")
    if nvcc is None:
        record.finish(skipped="nvcc is not on this machine")
        print("skipped: nvcc is not on this machine")
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    architecture = f"sm_{major}{minor}{'a' if major == 9 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "driver"
        built = compile_driver(nvcc, architecture, program)
        if built.returncode != 0:
            print(built.stdout + built.stderr)
            record.finish(failed=(built.stdout + built.stderr)[-2000:])
            return 1
        commands = {"driver": [str(program)]}
        if sanitizer is not None:
            commands["memcheck"] = [sanitizer, "--error-exitcode", "9", str(program)]
        codes = [_one(record, name, command) for name, command in commands.items()]
    record.finish(errors=sum(code != 0 for code in codes))
    return int(any(codes))


def _one(record: Record, name: str, command: list[str]) -> int:
    if not record.in_time:
        record.leave(name)
        return 0
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = (ran.stdout + ran.stderr).strip().splitlines()
    record.add(tool=name, exit=ran.returncode, lines=lines[-12:])
    print("\n".join(lines), flush=True)
    return ran.returncode
