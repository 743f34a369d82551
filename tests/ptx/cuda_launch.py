"""The kernels of csrc/cuda on the machine: tensors in, tensors out, through their own launchers."""

import ctypes
import math
import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .cuda_host import Compiled, Host, original
from .global_memory import Allocation, GlobalMemory
from .launch import run
from .machine import EARLY, Mode

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
watched: Callable | None = None  # called with each Launch and its Counts, where no other is given


class RankBackward(ctypes.Structure):
    """``RankBackward`` of rank_backward.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("dy", "h", "b", "dh", "db", "d_bias")),
                *((name, ctypes.c_int64) for name in ("rows", "width", "rank", "stride")),
                ("scale", ctypes.c_float), ("is_bf16", ctypes.c_bool)]  # fmt: skip


class TailGemm(ctypes.Structure):
    """``TailGemm`` of tail_gemm.h."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("a", "w", "s", "u", "bias", "bits", "out")),
                *((name, ctypes.c_int64) for name in
                  ("rows", "width", "depth", "rank", "a_stride", "out_stride")),
                ("keep_scale", ctypes.c_float),
                ("transposed", ctypes.c_bool), ("is_bf16", ctypes.c_bool)]  # fmt: skip


class LaunchError(RuntimeError):
    """A launcher returned an error; ``code`` is the cudaError_t."""

    def __init__(self, function: str, code: int):
        self.code = code
        super().__init__(f"{function} returned cudaError {code}")


def given(memory: GlobalMemory, name: str, tensor: Tensor | None) -> int | None:
    """The address of an input, whose whole storage becomes an allocation."""
    if tensor is None:
        return None
    storage = tensor.untyped_storage()
    if memory.containing(storage.data_ptr()) is None:
        memory.add(Allocation(storage.data_ptr(), storage.nbytes(), name=name))
    return tensor.data_ptr()


def poisoned(memory: GlobalMemory, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output that nobody wrote: bytes of ones, which are NaN in every type of floats."""
    size = math.prod(shape) * dtype.itemsize
    tensor = torch.full((size,), 0xFF, dtype=torch.uint8).view(dtype).view(shape)
    memory.add(Allocation(tensor.data_ptr(), size, is_written=False, name=name))
    return tensor


def _run(host: Host, function: str, *arguments, memory, dtype, mode: Mode, watch) -> None:
    watch = watch or watched
    error, launches = host.call(function, *arguments, memory=memory)
    if error:
        raise LaunchError(function, error)
    for launch in launches:
        counts = run(launch, mode, counted=watch is not None)
        if watch is not None:
            entry = replace(launch.entry, name=_short(launch.entry.name))
            watch(replace(launch, entry=entry, dtype=_NAMES[dtype]), counts)


def _short(mangled: str) -> str:
    """The name of a kernel in the source; a template's first number, its rank or cluster, after it."""
    found = re.search(r"(backward|add_parts|tail_gemm_kernel)I(?:\w*?Li(\d+))?", mangled)
    return "_".join(part for part in found.groups() if part) if found else mangled


def rank_backward(
    dy: Tensor, h: Tensor, b: Tensor, scale: float = 1.0, need_bias: bool = True,
    target: str = "sm_80", *, processors: int = 4, mode: Mode = EARLY,
    code: Compiled | None = None, watch: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dh, db, d_bias) of rank_backward.cu.

    Args:
        target: "sm_80" or "sm_90a".
        processors: multiprocessors of the device, which the grid depends on.
        code: what is run in the place of the source as it is.
        watch: called with each Launch and its Counts.
    """
    (M, N), R = dy.shape, h.shape[1]
    memory = GlobalMemory()
    dh = poisoned(memory, "dh", (M, R), dy.dtype)
    db = poisoned(memory, "db", (N, R), torch.float32)
    d_bias = poisoned(memory, "d_bias", (N,), torch.float32) if need_bias else None
    g = RankBackward(
        given(memory, "dy", dy), given(memory, "h", h), given(memory, "b", b),
        dh.data_ptr(), db.data_ptr(), d_bias.data_ptr() if need_bias else None,
        M, N, R, dy.stride(0), scale, dy.dtype == torch.bfloat16)  # fmt: skip
    host = Host(code or original("rank_backward"), target)
    host.library.rank_backward_workspace.restype = ctypes.c_int64
    size = host.library.rank_backward_workspace(ctypes.byref(g), processors)
    workspace = poisoned(memory, "workspace", (size // 4,), torch.float32)
    arguments = ctypes.byref(g), ctypes.c_void_p(workspace.data_ptr()), processors
    _run(host, "rank_backward", *arguments, memory=memory, dtype=dy.dtype, mode=mode,
         watch=watch)  # fmt: skip
    return dh, db, d_bias


def tail_gemm(
    a: Tensor, w: Tensor, s: Tensor, u: Tensor, bias: Tensor | None = None,
    bits: Tensor | None = None, keep_scale: float = 1.0, transposed: bool = False,
    cluster: int = 2, *, processors: int = 2, gap: int = 0, mode: Mode = EARLY,
    code: Compiled | None = None, watch: Callable | None = None,
) -> Tensor:  # fmt: skip
    """``a w + bias + mask * (s u)`` of tail_gemm.cu, (M, N).

    Args:
        gap: elements between the rows of the result; they stay as they were.
    """
    (M, K), R = a.shape, s.shape[1]
    N = w.shape[1] if transposed else w.shape[0]
    memory = GlobalMemory()
    out = poisoned(memory, "out", (M, N + gap), a.dtype)[:, :N]
    g = TailGemm(
        *(given(memory, name, tensor) for name, tensor in
          (("a", a), ("w", w), ("s", s), ("u", u), ("bias", bias), ("bits", bits))),
        out.data_ptr(), M, N, K, R, a.stride(0), N + gap, keep_scale, transposed,
        a.dtype == torch.bfloat16)  # fmt: skip
    host = Host(code or original("tail_gemm"), "sm_90a")
    arguments = ctypes.byref(g), processors, cluster
    _run(host, "tail_gemm", *arguments, memory=memory, dtype=a.dtype, mode=mode,
         watch=watch)  # fmt: skip
    return out
