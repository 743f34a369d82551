"""Quick launches: what is kept is kept under all that Triton compiles for."""

import ast
import itertools

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from benchmarks.common import REPOSITORY
from pelt_fast.kernels import launch


def kernel_source(a_ptr, b_ptr, scale, M, stride, BLOCK: tl.constexpr, DROP: tl.constexpr):
    pass


def jitted() -> jit.JITFunction:
    """The kernel as it is without the interpreter."""
    return jit.JITFunction(kernel_source)


def arguments():
    """Tensors of other dtypes and alignments or none, numbers on both sides of every limit."""
    wide = torch.zeros(64)
    pointers = [None, wide, wide[1:], wide[4:], wide.half(), wide.half()[1:]]
    integers = [0, 1, 2, 15, 16, 48, 2**31 - 1, 2**31, 2**31 + 15, -1, -16, -(2**31) - 16]
    for a, b in itertools.product(pointers, pointers[:3]):
        yield (a, b, 1.0, 16, 8)
    for scale, m, stride in itertools.product((0.5, 1.0, 2), integers, (1, 3, 32)):
        yield (wide, None, scale, m, stride)


def test_the_same_key_is_the_same_specialisation_for_triton():
    kernel = jitted()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    quick, kept = launch.launched(kernel), {}
    for given in arguments():
        specialisation = str(bind(*given, BLOCK=1, DROP=False)[1])
        assert kept.setdefault(quick.classify(*given), specialisation) == specialisation, given
    assert len(set(kept.values())) > 20


class Driver:
    """A device and a stream."""

    class active:
        device = 0
        get_current_device = staticmethod(lambda: Driver.active.device)
        get_current_stream = staticmethod(lambda device: 100 + device)


class Compiled:
    """What Triton gives for a launch: it notes what it is run with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.runs = []

    def run(self, *arguments):
        self.runs.append(arguments)


@pytest.fixture
def quick(monkeypatch):
    """The kernel under a driver that only counts; ``slow`` has Triton's own launches."""
    made = launch.launched(jitted())
    slow: list[tuple] = []

    def run(kernel, *arguments, grid, warmup, **constants):
        slow.append((grid, arguments, constants))
        return Compiled()

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    monkeypatch.setattr(launch, "driver", Driver)
    made.slow = slow
    return made


def test_a_later_launch_gets_the_arguments_in_the_order_of_the_kernel(quick):
    x = torch.zeros(16)
    for _ in range(2):
        quick[(3,)](x, None, 0.5, 32, 1, DROP=True, BLOCK=64, num_warps=4)
    assert len(quick.slow) == 1
    (kept,) = quick.compiled.values()
    assert kept[0].runs == [
        (3, 1, 1, 100, "function", "metadata", None, None, None, x, None, 0.5, 32, 1, 64, True)
    ]
    quick[(3, 5)](x, None, 0.25, 48, 1, DROP=True, BLOCK=64, num_warps=4)
    assert kept[0].runs[1][:3] == (3, 5, 1) and len(quick.slow) == 1
    quick[(3, 5, 7)](x, None, 0.25, 48, 1, DROP=True, BLOCK=64, num_warps=4)
    assert kept[0].runs[2][:3] == (3, 5, 7)


def test_what_triton_compiles_anew_is_launched_by_triton_first(quick, monkeypatch):
    x = torch.zeros(17)
    common = dict(BLOCK=64, DROP=True, num_warps=4)
    variants = [
        ((x, None, 0.5, 32, 1), common),
        ((x[1:], None, 0.5, 32, 1), common),
        ((x, x, 0.5, 32, 1), common),
        ((x, None, 0.5, 33, 1), common),
        ((x, None, 0.5, 32, 1), {**common, "num_warps": 8}),
        ((x, None, 0.5, 32, 1), {**common, "BLOCK": 32}),
    ]
    for count, (given, constants) in enumerate(variants, start=1):
        quick[(1,)](*given, **constants)
        assert len(quick.slow) == count
    monkeypatch.setattr(Driver.active, "device", 1)
    quick[(1,)](*variants[0][0], **common)
    assert len(quick.slow) == len(variants) + 1


def test_a_profiler_that_asks_for_launches_is_told(quick):
    x = torch.zeros(16)
    told = []
    for _ in range(2):
        quick[(1,)](x, None, 0.5, 32, 1, BLOCK=64, DROP=False)
    hook = launch.hooks.launch_enter_hook
    hook.add(told.append)
    try:
        quick[(1,)](x, None, 0.5, 32, 1, BLOCK=64, DROP=False)
    finally:
        hook.remove(told.append)
    assert len(quick.slow) == 2


def test_constants_come_last():
    def kernel(BLOCK: tl.constexpr, x_ptr):
        pass

    with pytest.raises(TypeError, match="constexpr parameters must come last"):
        launch.launched(jit.JITFunction(kernel))


def test_the_interpreter_s_kernel_is_left_as_it_is():
    kernel = object()
    assert launch.launched(kernel) is kernel
    assert triton.__version__


# its arguments are descriptors, which Triton takes apart at each launch
BY_TRITON = {"tail_gemm_descriptor_kernel"}


def decorated() -> dict[str, list[str]]:
    """The decorators of every function of kernels/ that is compiled."""
    found = {}
    for path in (REPOSITORY / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                found[node.name] = [ast.unparse(d) for d in node.decorator_list]
    return {name: marks for name, marks in found.items() if "triton.jit" in marks}


def test_kernels_are_launched_and_what_they_call_is_not():
    for name, marks in decorated().items():
        is_kernel = "_kernel" in name and name not in BY_TRITON
        assert ("launched" in marks) == is_kernel, name
        assert marks[0] == "launched" or not is_kernel, name
