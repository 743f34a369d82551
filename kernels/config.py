"""What runs on which device: a kernel's tile, and the plan or kernel if there are several.

Answers are rows of ``tuned``, if they were measured on a GPU, else of the tables here and in
``tiles``. This file imports without a GPU.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from pelt_fast.kernels import tuned
from pelt_fast.kernels.tile import Row, Tile
from pelt_fast.kernels.tiles import MAX_RANK, TABLES

# the largest rank at which our kernel should beat the library's GEMM and its extra passes: our
# kernel is for bandwidth-bound products, the library for those with many flops a byte. Unmeasured;
# an entry of tuned.FUSED_RANK may not be larger
FUSED_RANK = {
    "adapter": 128,
    "rank_down": 128,
    "rank_down_bwd": 128,
    "rank_up": 128,
    "rank_up_bwd": 64,
}


def fused_rank(kernel: str, device: torch.device) -> int:
    """The largest rank at which ``kernel`` runs on ``device``; above it the library runs."""
    return tuned.FUSED_RANK.get(architecture(device), {}).get(kernel, FUSED_RANK[kernel])


@dataclass(frozen=True)
class PlanRow:
    """How the rank update is added to the frozen GEMM, for ranks up to ``limit``, and why."""

    limit: int
    plan: str
    why: str


# "accumulate": library GEMM, then rank_up over its output; "tail", "tail_descriptor", "tail_cuda"
# (csrc/cuda, Hopper): our GEMM with the rank tail. Rows are filled by make gpu PART=tune
LORA_PLANS: dict[str, tuple[PlanRow, ...]] = {
    "any": (PlanRow(MAX_RANK, "accumulate", "nothing measured yet"),),
}


def lora_plan(rank: int, device: torch.device) -> str:
    """The plan of a LoRA linear of ``rank`` on ``device``."""
    if "plan" in _forced:
        return _forced["plan"]
    if _cuda.get():
        return "tail_cuda"
    arch = architecture(device)
    measured = [PlanRow(*row) for row in tuned.PLANS.get(arch, ())]
    rows = measured or LORA_PLANS.get(arch, LORA_PLANS["any"])
    return next(row.plan for row in rows if rank <= row.limit)


# the library kernel of an unmasked 16-bit context: "flash", or "cudnn" if measured faster
CONTEXT_KERNELS = {"any": "flash"}


def context_kernel(device: torch.device) -> str:
    """The name of that kernel on ``device``."""
    if "context" in _forced:
        return _forced["context"]
    known = {**CONTEXT_KERNELS, **tuned.CONTEXT}
    return known.get(architecture(device), known["any"])


# the kernel that makes dS and dB from one read of dy: "triton" (rank_up_bwd), or "cuda" (csrc/cuda)
# where that was measured faster
ONE_PASS_KERNELS = {"any": "triton"}


def one_pass_kernel(device: torch.device) -> str:
    """The name of that kernel on ``device``."""
    if "one_pass" in _forced:
        return _forced["one_pass"]
    if _cuda.get():
        return "cuda"
    known = {**ONE_PASS_KERNELS, **tuned.ONE_PASS}
    return known.get(architecture(device), known["any"])


_cuda: ContextVar[bool] = ContextVar("pelt_fast_cuda", default=False)


@contextlib.contextmanager
def cuda_kernels() -> Iterator[None]:
    """Context: the CUDA C++ kernels run on every input that they take (backend "cuda")."""
    token = _cuda.set(True)
    try:
        yield
    finally:
        _cuda.reset(token)


_forced: dict[str, object] = {}


@contextlib.contextmanager
def forced(name: str, value) -> Iterator[None]:
    """Context: the table called ``name`` (a kernel's, "plan", "one_pass" or "context") answers
    ``value``. It serves to measure candidates."""
    before = _forced.copy()
    _forced[name] = value
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def architecture(device: torch.device) -> str:
    """ "sm90", "sm80", "gfx942", ...; "any" on a machine without a GPU (the interpreter)."""
    return _architecture(device.index) if device.type == "cuda" else "any"


@functools.cache
def _architecture(index: int | None) -> str:
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm{major}{minor}"


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few on a CPU, so that the interpreter runs splits too."""
    return _processors(device.index) if device.type == "cuda" else 4


def warps(threads: int, device: torch.device) -> int:
    """The warps of so many threads: AMD's have 64."""
    return threads // (64 if architecture(device).startswith("gfx") else 32)


# a table that is measured apart for some inputs -> the table that serves them until it is measured
SHARED = {"prefix_short": "prefix", "prefix_bwd_dropped": "prefix_bwd"}
SHORT = 64  # keys of a prefix


def pick(kernel: str, bits: int, size: int, device: torch.device) -> Tile:
    """The tile of ``kernel`` for elements of ``bits`` and the class size (rank, head dim)."""
    for name in (kernel, SHARED.get(kernel)):
        if name in _forced:
            return _forced[name]
    for arch in (architecture(device), "any"):
        for row in rows(kernel, arch):
            if row.bits == bits and size <= row.limit:
                return row.tile
    raise LookupError(f"{kernel} has no tile for {bits}-bit elements and size {size}")


@functools.cache
def rows(kernel: str, arch: str) -> tuple[Row, ...]:
    """The rows of one architecture, measured ones first."""
    measured = (
        Row(bits, limit, Tile(**tile), why)
        for bits, limit, tile, why in tuned.TILES.get(kernel, {}).get(arch, ())
    )
    others = rows(SHARED[kernel], arch) if kernel in SHARED else TABLES[kernel].get(arch, ())
    return (*measured, *others)


def cdiv(count: int, size: int) -> int:
    """Blocks of ``size`` that hold ``count``. Triton's ``cdiv`` is slow on the host."""
    return -(-count // size)


def padded(size: int) -> int:
    """The block that holds ``size``: a power of two, at least 16, as tensor cores need."""
    return max(16, 1 << (size - 1).bit_length())


def split(programs: int, blocks: int, device: torch.device, each: int = 2) -> tuple[int, int]:
    """Blocks a part and parts: a loop of ``blocks`` cut so that ``programs`` fill the device.

    At most ``each`` programs a processor (``Tile.programs``); at least two blocks a part. The
    split depends on sizes alone, so results are the same bits each time.
    """
    wanted = each * processors(device) // max(programs, 1)
    blocks = max(blocks, 1)
    part_blocks = cdiv(blocks, max(1, min(wanted, blocks // 2, 64)))
    return part_blocks, cdiv(blocks, part_blocks)
