"""Triton's launches, compiled for a GPU that is not here and executed by the machine.

``on_the_machine("sm90")`` puts it in the place of Triton's launcher: kernels and their launchers
are called as on a GPU, with CPU tensors. It never falls back to the interpreter.
"""

import contextlib
import struct
from collections.abc import Callable, Iterator

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_kernel
from triton.runtime import jit

from .errors import Unsupported
from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import Launch, Mode
from .parser import parse
from .program import Entry

TARGETS = {"sm80": GPUTarget("cuda", 80, 32), "sm90": GPUTarget("cuda", 90, 32)}
_PACKED = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B",
           "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip
_entries: dict[str, Entry] = {}


def compiled_for(kernel, target: str, args, kwargs):
    """What Triton makes of a launch, and the types of the arguments that are left in it."""
    backend = make_backend(TARGETS[target])
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = compile_kernel(source, target=TARGETS[target], options=options.__dict__)
    given = [
        (name, type_, bound[name]) for name, type_ in signature.items() if type_ != "constexpr"
    ]
    return compiled, given


def packed(entry: Entry, given: list[tuple], memory: GlobalMemory) -> bytes:
    """The parameter memory of a launch. Tensors become allocations."""
    data = bytearray(entry.parameter_bytes)
    for parameter, (name, type_, value) in zip(entry.parameters, given):
        if type_.startswith("*"):
            value, form = pointer(value, memory, name), "Q"
        elif type_ in _PACKED:
            form = _PACKED[type_]
        else:
            raise Unsupported(f"argument {name} of type {type_}")
        struct.pack_into(form, data, parameter.offset, value)
    return bytes(data)


def pointer(tensor: torch.Tensor, memory: GlobalMemory, name: str) -> int:
    """The address of a tensor, whose whole storage the kernel may touch."""
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    if size and memory.containing(start) is None:
        memory.add(Allocation(start, size, name=name))
    return tensor.data_ptr()


def launch_of(compiled, given: list[tuple], grid: tuple[int, ...]) -> Launch:
    """A compiled kernel and its arguments as a launch of the machine."""
    metadata, text = compiled.metadata, compiled.asm["ptx"]
    if text not in _entries:
        _entries[text] = parse(text, metadata.name)
    entry, memory = _entries[text], GlobalMemory()
    arguments = list(given)
    blocks = grid[0] * grid[1] * grid[2]
    scratch_bytes = getattr(metadata, "global_scratch_size", 0) * blocks
    if scratch_bytes:
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8)
        arguments.append(("global_scratch", "*u8", scratch))
        start = scratch.data_ptr()
        memory.add(Allocation(start, scratch_bytes, is_written=False, name="global_scratch"))
    cluster = getattr(metadata, "num_ctas", 1)
    return Launch(entry, grid, metadata.num_warps * 32, packed(entry, arguments, memory),
                  metadata.shared, cluster, memory)  # fmt: skip


@contextlib.contextmanager
def on_the_machine(
    target: str, mode: Mode = Mode(), watch: Callable | None = None
) -> Iterator[None]:
    """Inside, ``kernel[grid](...)`` of a ``triton.jit`` kernel runs on the machine.

    Args:
        target: "sm80" or "sm90".
        mode: how asynchronous work and warps are ordered.
        watch: called with each Launch and its Counts.
    """
    if target not in TARGETS:
        raise Unsupported(f"target {target!r} is not known; known are {', '.join(TARGETS)}")

    def launch(kernel, *args, grid, warmup, **kwargs):
        compiled, given = compiled_for(kernel, target, args, kwargs)
        grid = grid({name: value for name, _, value in given}) if callable(grid) else grid
        launched = launch_of(compiled, given, (*grid, 1, 1)[:3])
        counts = run(launched, mode, counted=watch is not None)
        if watch is not None:
            watch(launched, counts)

    kept, jit.JITFunction.run = jit.JITFunction.run, launch
    try:
        yield
    finally:
        jit.JITFunction.run = kept
