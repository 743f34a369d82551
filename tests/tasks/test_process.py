"""A run's own process, and memory that is kept between steps."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from pelt_fast.tasks.process import alone, keep_freed_memory

MEGABYTES = 200


def test_another_process_gives_its_result_and_its_error():
    assert alone(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        alone(int, "seven")


def test_a_process_that_dies_is_told():
    with pytest.raises(BrokenProcessPool):
        alone(os._exit, 3)


def _stays(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux whether it is there")
def test_a_killed_study_leaves_no_run_behind(tmp_path):
    pid = tmp_path / "pid"
    script = tmp_path / "study.py"
    script.write_text(
        "from tests.tasks.test_process import _stays, alone\n"
        f"if __name__ == '__main__':\n    alone(_stays, {str(pid)!r})\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    study = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": paths})
    wait_until(lambda: pid.exists() and pid.read_text())
    study.kill()
    study.wait()
    run = Path("/proc", pid.read_text(), "stat")
    wait_until(lambda: not run.exists() or run.read_text().split()[2] == "Z")


def wait_until(happened, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def _faults_of_a_second_block(keep: bool) -> int:
    """Pages that a block costs where one of its size was freed before."""
    if keep:
        assert keep_freed_memory()
    libc, size = ctypes.CDLL(None), MEGABYTES << 20
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = libc.malloc(size)
        libc.memset(block, 0, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept():
    kept = alone(_faults_of_a_second_block, True)
    returned = alone(_faults_of_a_second_block, False)
    assert kept < returned / 4, f"{kept} page faults, {returned} without"
