"""A run's own process, and memory that is kept between steps."""

import ctypes
import os
import platform
import resource
from concurrent.futures.process import BrokenProcessPool

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
