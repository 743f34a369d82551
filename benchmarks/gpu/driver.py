"""The CUDA C++ kernels of csrc/cuda/: nvcc builds a driver without torch, which checks every result
against fp64 on the host, prints time beside its floor, and runs under compute-sanitizer; and the
ops of torch, built beside the package, which the numerics suite then judges."""

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from benchmarks.common import REPOSITORY
from csrc import nvcc
from pelt_fast.ops.common import native_cuda

from .numerics import environment
from .record import Record
from .toolkit import found

OPS = REPOSITORY.joinpath(*nvcc.MODULE.split(".")).with_suffix(".so")
SECONDS = 240  # a kernel that hangs is ended
SUITE = "tests/numerics/test_cuda_kernels.py"


def _run(command: list[str], **options) -> subprocess.CompletedProcess:
    """Run a command. A command that takes too long fails, and the message says so."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, **options)
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if error.stdout else ""
        return subprocess.CompletedProcess(command, 124, said, f"ended after {SECONDS} s")


def compile_driver(compiler: str, folder: Path) -> subprocess.CompletedProcess:
    """Build ``folder``/driver; the first command that fails is returned."""
    sources = [*nvcc.kernels(), nvcc.CUDA / "driver.cu"]
    parts = nvcc.objects(compiler, sources, folder)
    link = [compiler, *(str(part) for part, _ in parts), "-o", str(folder / "driver")]
    for command in [*(command for _, command in parts), link]:
        built = _run(command)
        if built.returncode:
            break
    return built


def build_ops(compiler: str | None) -> str | None:
    """Build the ops into the package if they are missing; returns why that failed, or None."""
    if find_spec(nvcc.MODULE) is not None:
        return None
    if compiler is None:
        return "nvcc is not on this machine"
    with tempfile.TemporaryDirectory() as scratch:
        built, torch_lib = Path(scratch) / OPS.name, Path(TORCH_LIB_PATH)
        for command in nvcc.library(compiler, built, Path(scratch), include_paths(), torch_lib):
            ran = _run(command)
            if ran.returncode:
                return (ran.stdout + ran.stderr)[-2000:]
        OPS.write_bytes(built.read_bytes())
    return None


def run(record: Record, device: torch.device) -> int:
    """Build and run everything; 1 when a result is wrong, a tool reports an error, or torch does
    not load the ops (their tests are then skipped)."""
    compiler, sanitizer = found("nvcc"), found("compute-sanitizer")
    if compiler is None:
        record.finish(skipped="nvcc is not on this machine")
        print("skipped: nvcc is not on this machine")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        built = compile_driver(compiler, Path(scratch))
        if built.returncode != 0:
            print(built.stdout + built.stderr)
            record.finish(failed=(built.stdout + built.stderr)[-2000:])
            return 1
        program = str(Path(scratch) / "driver")
        suite = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", SUITE]
        commands = {"driver": [program], "numerics": suite}
        if sanitizer is not None:
            commands["memcheck"] = [sanitizer, "--error-exitcode", "9", program, "small"]
        codes = [_one(record, name, command) for name, command in commands.items()]
    missing = native_cuda.why_missing()
    if missing is not None:
        record.add(tool="ops", exit=1, lines=[missing])
        codes.append(1)
    record.finish(errors=sum(code != 0 for code in codes))
    return int(any(codes))


def _one(record: Record, name: str, command: list[str]) -> int:
    if not record.in_time:
        record.leave(name)
        return 0
    ran = _run(command, cwd=REPOSITORY, env=environment())
    lines = (ran.stdout + ran.stderr).strip().splitlines()
    record.add(tool=name, exit=ran.returncode, lines=lines[-60:])
    print("\n".join(lines), flush=True)
    return ran.returncode
