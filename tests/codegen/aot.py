"""Compile what the launchers launch, for a GPU that is not here, and read the machine code.

A launcher is called with CPU tensors that are never touched; in the place of a launch the kernel
is compiled with the types, constants and divisibility attributes Triton's own launcher infers.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from pelt_fast.kernels import config

from .races import races

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304}

_COUNTED = {
    "wgmma": r"\bHGMMA",
    "mma": r"\b(?:HMMA|UTCHMMA|UTCQMMA)|v_mfma",
    "tma": r"\bUTMALDG",
    "local": r"\b(?:LDL|STL)\b",
    "fp64": r"\b(?:DADD|DMUL|DFMA|DSETP|DMNMX)\b|v_\w+_f64",
    "wide": r"\b(?:LDG|STG|LDGSTS)\.E\.(?:\w+\.)*128|(?:global|buffer)_(?:load|store)_dwordx4",
    "narrow": r"\b(?:LDG|STG|LDGSTS)\.E\b(?!\.(?:\w+\.)*128)"
    r"|(?:global|buffer)_(?:load|store)_(?!dwordx4)\w+",
    "umulhi": r"IMAD\.(?:HI|WIDE)\.U32|v_mul_hi_u32|v_mad_u64_u32",
}


_compiled: dict[tuple, "Machine"] = {}  # many launches make the same kernel


@dataclass
class Machine:
    """What one kernel became on one target."""

    kernel: str
    target: str
    dtype: str
    constants: dict
    options: dict
    registers: int
    spills: int
    shared: int
    counts: dict = field(repr=False)
    assembly: str = field(repr=False, default="")


def narrow_strides(ttir: str) -> list[str]:
    """32-bit strides used before they are widened: products that could overflow."""
    strides = set(re.findall(r"(%stride_\w+): i32", ttir))
    uses = re.findall(r"^\s+%\S+ = (?!arith\.extsi)[\w.]+ .*$", ttir, re.MULTILINE)
    return sorted(s for s in strides if any(re.search(rf"{s}\b", use) for use in uses))


def slow_dots(ttgir: str) -> int:
    """Dots of 16-bit operands with 64 rows or more that did not become wgmma."""
    shapes = re.findall(r"tt\.dot .* : tensor<(\d+)x\d+x(?:b?f16)", ttgir)
    return sum(int(rows) >= 64 for rows in shapes)


def _compile(kernel, target_name: str, args, kwargs) -> Machine:
    target = TARGETS[target_name]
    backend = make_backend(target)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    key = (kernel.fn, target_name, *map(str, (signature, constexprs, attrs, options)))
    if key not in _compiled:
        _compiled[key] = _read(kernel, target_name, signature, constexprs, attrs, options)
    return _compiled[key]


def _read(kernel, target_name: str, signature, constexprs, attrs, options) -> Machine:
    """Compile a kernel and read what it became."""
    target = TARGETS[target_name]
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    floats = [t.removeprefix("*") for t in signature.values() if t in ("*fp16", "*bf16", "*fp32")]
    constants = {kernel.params[path[0]].name: value for path, value in constexprs.items()}
    text = compiled.asm["amdgcn"] if target.backend == "hip" else compiled.asm["sass"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _COUNTED.items()}
    asm = compiled.asm
    counts["dots"] = asm["ttir"].count("tt.dot ")
    counts["slow_dots"] = slow_dots(asm["ttgir"])
    counts["tf32"] = asm.get("ptx", "").count("tf32")
    counts["long_products"] = len(re.findall(r"m(?:ul|ad)\.lo\.s64", asm.get("ptx", "")))
    counts["races"] = len(races(asm["ttgir"])) if target.backend == "cuda" else 0
    counts["narrow_strides"] = len(narrow_strides(asm["ttir"]))
    if target.backend == "hip":
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text).group(1))
    else:
        used = {int(n) for n in re.findall(r"\bR(\d+)\b", text)}
        registers, spills = max(used) + 1, counts["local"]
    return Machine(
        kernel.fn.__name__.removeprefix("_"), target_name, floats[0] if floats else "",
        constants, dict(num_warps=options.num_warps, num_stages=options.num_stages),
        registers, spills, compiled.metadata.shared, counts, text,
    )  # fmt: skip


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list[Machine]]:
    """Inside, a launch compiles for ``target``; yields the list the results go to."""
    machines: list[Machine] = []

    def launch(kernel, *args, grid, warmup, **kwargs):
        machines.append(_compile(kernel, target, args, kwargs))

    kept = jit.JITFunction.run, config.architecture, config.processors
    jit.JITFunction.run = launch
    config.architecture = lambda device: target
    config.processors = lambda device: PROCESSORS[target]
    try:
        yield machines
    finally:
        jit.JITFunction.run, config.architecture, config.processors = kept


def machines_of(launch: Callable[[], object], target: str) -> list[Machine]:
    """What the launches inside ``launch()`` become on ``target``."""
    with compiling_for(target) as machines:
        launch()
    return machines
