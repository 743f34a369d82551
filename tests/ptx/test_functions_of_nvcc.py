"""Functions that nvcc leaves, executed: calls of calls, structures by value, loops that some threads
leave early, and calls by a part of a warp."""

import struct
import subprocess

import numpy as np
import pytest

from csrc import nvcc

from .cuda_host import NVCC
from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import EARLY, LATE, Launch, Mode
from .parser import parse

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="nvcc is not on this machine: no functions of it"
)
THREADS, BLOCKS = 64, 3
SOURCE = """
struct Halved { float value; int steps; double sum; };

__noinline__ __device__ Halved halved(float x, int most) {
  Halved h{x, 0, x};
  while (h.steps < most) {
    if (h.value < 1.0f) return h;
    h.value *= 0.5f;
    ++h.steps;
    h.sum += h.value;
  }
  h.steps = -1;
  return h;
}
__noinline__ __device__ float twice(float x, int n) {
  if (n % 3 == 0) return -x;
  const Halved p = halved(x, n), q = halved(p.value + 3.0f, 2);
  return p.value + 4.0f * q.value + static_cast<float>(p.steps);
}
__noinline__ __device__ float from_neighbour(float x) { return __shfl_xor_sync(~0u, x, 1); }
__noinline__ __device__ void keep(float* to, float value, unsigned char low) { *to = value + low; }

extern "C" __global__ void program(const float* x, const int* n, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float y;
  if (n[i] & 1) {
    y = twice(x[i], n[i]);
  } else {
    const Halved h = halved(x[i], n[i]);
    y = static_cast<float>(h.sum) - h.steps;
  }
  y += from_neighbour(y);
  if (n[i] != 5) keep(out + i, y, static_cast<unsigned char>(n[i]));
}
"""


@pytest.fixture(scope="module", params=["80", "90a"])
def text(request, tmp_path_factory) -> str:
    """The PTX of the source, by the flags that csrc/cuda is compiled with."""
    folder = tmp_path_factory.mktemp("functions")
    source, to = folder / "functions.cu", folder / "functions.ptx"
    source.write_text(SOURCE)
    command = nvcc.compile_command(NVCC, source, to, "-ptx", f"-arch=compute_{request.param}")
    ran = subprocess.run([w for w in command if w != "-c"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return to.read_text()


def halved(x: np.ndarray, most: np.ndarray):
    """(value, steps, sum) of each element."""
    value, steps, total = x.copy(), np.zeros(len(x), np.int32), x.astype(np.float64)
    for step in range(int(np.max(most))):
        going = (step < most) & (value >= 1)
        value[going] *= np.float32(0.5)
        steps[going] += 1
        total[going] += value[going]
    return value, np.where(steps >= most, -1, steps).astype(np.int32), total


def wanted(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """What the program writes; NaN where it writes nothing."""
    value, steps, total = halved(x, n)
    second, _, _ = halved(value + np.float32(3), np.full_like(n, 2))
    of_two = value + np.float32(4) * second + steps.astype(np.float32)
    of_one = total.astype(np.float32) - steps.astype(np.float32)
    y = np.where(n % 2 == 1, np.where(n % 3 == 0, -x, of_two), of_one)
    y = y + y.reshape(-1, 2)[:, ::-1].reshape(-1)
    return np.where(n == 5, np.float32(np.nan), y + (n % 256).astype(np.float32))


@pytest.mark.parametrize("mode", [EARLY, LATE, Mode(shuffled=True, seed=3)])
def test_functions_compute_what_numpy_computes(text, mode):
    entry, generator = parse(text, "program"), np.random.default_rng(0)
    assert len(entry.functions) == 4  # none was inlined
    x = generator.uniform(0, 40, THREADS * BLOCKS).astype(np.float32)
    n = generator.integers(0, 9, THREADS * BLOCKS, dtype=np.int32)
    out, memory = np.full(len(x), np.nan, np.float32), GlobalMemory()
    for array in (x, n, out):
        memory.add(Allocation(array.ctypes.data, array.nbytes))
    data = struct.pack("3Q", *(array.ctypes.data for array in (x, n, out)))
    run(Launch(entry, (BLOCKS, 1, 1), THREADS, data, memory=memory), mode)
    np.testing.assert_array_equal(out, wanted(x, n))
