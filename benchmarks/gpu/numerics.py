"""The numerics suite and ``pelt-fast check``, compiled on the GPU; stops at the first miss."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY

from .record import Record

WORKERS = 12  # processes: what takes the time is compiling


def environment() -> dict[str, str]:
    """This process's, with the package on the path and the kernels compiled."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def collect(folder: str = "tests/numerics") -> list[str]:
    """The names of the tests."""
    command = [sys.executable, "-m", "pytest", folder, "--collect-only", "-qq", "-o", "addopts="]
    ran = subprocess.run(
        [part if part != "-qq" else "-q" for part in command],
        cwd=REPOSITORY, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    names = [line for line in ran.stdout.splitlines() if "::" in line]
    if ran.returncode or not names:
        raise RuntimeError(f"pytest found no tests:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return names


def run(record: Record, device: torch.device, folder: str = "tests/numerics") -> int:
    """Run everything in several processes; 1 at the first that fails."""
    names = collect(folder)
    workers = min(WORKERS, os.cpu_count() or 1, len(names))
    with tempfile.TemporaryDirectory() as scratch:
        running = {i: _start(names[i::workers], Path(scratch) / f"{i}.log") for i in range(workers)}
        failed = _watch(record, running, Path(scratch))
    if failed is None and record.in_time:
        failed = _check(record, device)
    record.finish(tests=len(names), miss=failed)
    print("every comparison inside its budget" if failed is None else f"MISS\n{failed}")
    return 0 if failed is None else 1


def _start(names: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=", *names]
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=out, stderr=subprocess.STDOUT
        )


def _watch(record: Record, running: dict[int, subprocess.Popen], scratch: Path) -> str | None:
    """Wait for all processes; end the others at the first failure or when the time is over."""
    failed, waiting = None, dict(running)
    while waiting and failed is None:
        time.sleep(0.5)
        for i in [i for i, process in waiting.items() if process.poll() is not None]:
            code, text = waiting.pop(i).returncode, (scratch / f"{i}.log").read_text()
            record.add(worker=i, exit=code, last=text.strip().splitlines()[-1:])
            if code:
                failed = text[-4000:]
        if not record.in_time:
            for i in waiting:
                record.leave(f"worker {i} had not finished")
            break
    for process in waiting.values():
        process.kill()
    return failed


def _check(record: Record, device: torch.device) -> str | None:
    command = [sys.executable, "-m", "pelt_fast", "check", "--device", device.type]
    ran = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    record.add(command="pelt-fast check", exit=ran.returncode, last=ran.stdout.splitlines()[-1:])
    misses = [line for line in ran.stdout.splitlines() if line.startswith("MISS")]
    return "\n".join(misses) or (ran.stderr[-2000:] if ran.returncode else None)
