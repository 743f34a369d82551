"""Triton's launches, compiled for a GPU that is not here and executed by the machine.

``on_the_machine("sm90")`` puts it in the place of Triton's launcher: kernels and their launchers
are called as on a GPU, with CPU tensors. It never falls back to the interpreter.
"""

import collections
import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_kernel
from triton.runtime import jit

from .errors import Unsupported
from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import EARLY, Launch, Mode
from .parser import parse
from .program import Entry
from .unwritten import flags

TARGETS = {"sm80": GPUTarget("cuda", 80, 32), "sm90": GPUTarget("cuda", 90, 32)}
_PACKED = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B",
           "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "f32": "f", "fp64": "d"}  # fmt: skip
executed: collections.Counter[str] = collections.Counter()  # launches by the kernel's name
_entries: dict[str, Entry] = {}


def compiled_for(kernel, target: str, args, kwargs):
    """What Triton makes of a launch, and the arguments that are left in it, with their types."""
    backend = make_backend(TARGETS[target])
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    with _up_to_ptx():
        compiled = compile_kernel(source, target=TARGETS[target], options=options.__dict__)
    given = [(name, kind, bound[name]) for name, kind in signature.items() if kind != "constexpr"]
    return compiled, given


@contextlib.contextmanager
def _up_to_ptx() -> Iterator[None]:
    """Inside, Triton stops before ptxas, which takes half of the time. The files of these
    compilations have a folder of their own: they hold no machine code."""

    def stop(backend, stages, options, language, capability):
        stages["cubin"] = lambda ptx, metadata: ptx.encode()

    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = stop
        knobs.cache.dir = str(Path(knobs.cache.dir) / "ptx")
        yield


def packed(entry: Entry, given: list[tuple], memory: GlobalMemory) -> bytes:
    """The parameter memory of a launch. Tensors become allocations."""
    data = bytearray(entry.parameter_bytes)
    for parameter, (name, kind, value) in zip(entry.parameters, given):
        if kind.startswith("*"):
            value, form = pointer(value, memory, name), "Q"
        elif kind in _PACKED:
            form = _PACKED[kind]
        else:
            raise Unsupported(f"argument {name} has the type {kind}")
        struct.pack_into(form, data, parameter.offset, value)
    return bytes(data)


def pointer(tensor: torch.Tensor, memory: GlobalMemory, name: str) -> int:
    """The address of a tensor, whose whole storage the kernel may touch."""
    storage = tensor.untyped_storage()
    start, size = storage.data_ptr(), storage.nbytes()
    if size and memory.containing(start) is None:
        memory.add(Allocation(start, size, name=name)).written = flags(tensor)
    return tensor.data_ptr()


def launch_of(compiled, given: list[tuple], grid: tuple[int, ...], edit: Callable | None) -> Launch:
    """A compiled kernel and its arguments as a launch of the machine."""
    metadata, text = compiled.metadata, compiled.asm["ptx"]
    if edit is not None:
        text = edit(text)
    if text not in _entries:
        _entries[text] = parse(text, metadata.name)
    entry, memory = _entries[text], GlobalMemory()
    arguments = list(given)
    scratch_bytes = metadata.global_scratch_size * grid[0] * grid[1] * grid[2]
    if scratch_bytes:
        scratch = torch.empty(scratch_bytes + 128, dtype=torch.uint8)
        scratch = scratch[-scratch.data_ptr() % 128 :]  # room for tensor maps, aligned
        arguments.append(("global_scratch", "*u8", scratch))
        start, size = scratch.untyped_storage().data_ptr(), scratch_bytes + 128
        memory.add(Allocation(start, size, is_written=False, name="global_scratch"))
    return Launch(entry, grid, metadata.num_warps * 32, packed(entry, arguments, memory),
                  metadata.shared, metadata.num_ctas, memory, _dtype(given), arguments)  # fmt: skip


def _dtype(given: list[tuple]) -> str:
    """The type of the first floats among the arguments."""
    floats = [kind[1:] for _, kind, _ in given if kind in ("*fp16", "*bf16", "*fp32")]
    return next((kind for kind in floats if kind != "fp32"), floats[0] if floats else "")


@contextlib.contextmanager
def on_the_machine(
    target: str,
    mode: Mode = EARLY,
    watch: Callable | None = None,
    counted: bool = True,
    edit: Callable[[str], str] | None = None,
) -> Iterator[None]:
    """Inside, ``kernel[grid](...)`` of a ``triton.jit`` kernel runs on the machine.

    Args:
        target: "sm80" or "sm90".
        mode: how asynchronous work and warps are ordered.
        watch: called with each Launch and its Counts, whose numbers are zeros without ``counted``.
        counted: count what each launch does, where it is watched.
        edit: changes the PTX before it is parsed; a test breaks a kernel with it.
    """
    if target not in TARGETS:
        raise Unsupported(f"target {target!r} is not known; known are {', '.join(TARGETS)}")

    def launch(kernel, *args, grid, warmup, **kwargs):
        compiled, given = compiled_for(kernel, target, args, kwargs)
        grid = grid({name: value for name, _, value in given}) if callable(grid) else grid
        made = launch_of(compiled, given, (*grid, 1, 1)[:3], edit)
        counts = run(made, mode, counted and watch is not None)
        executed[made.entry.name] += 1
        if watch is not None:
            watch(made, counts)

    kept, jit.JITFunction.run = jit.JITFunction.run, launch
    try:
        yield
    finally:
        jit.JITFunction.run = kept
