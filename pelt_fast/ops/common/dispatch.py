"""What runs where: the only file with rules about devices and dtypes, and the log of fallbacks.

``plan(...)`` names what an op will run for an input. If this is not the op's fastest plan, it gives
the reason. ``unsupported(...)`` is the rule of the Triton kernels alone.
"""

import functools
import importlib.util
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pelt_fast import env
from pelt_fast.kernels.config import cuda_kernels as cuda_kernels
from pelt_fast.kernels.tiles import MAX_HEAD_DIM, MAX_PREFIX, MAX_RANK

from .backends import active_backend

logger = logging.getLogger("pelt_fast")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Plan:
    """What runs, and why only the reference runs (None if another plan runs)."""

    name: str
    reason: str | None = None


def plan(
    op: str,
    device: torch.device,
    attention_dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    size: int = 1,
) -> Plan:
    """The plan of ``op`` ("lora", "adapter", "ffn", "beside", "routed" or "prefix") on ``device``,
    for activations of ``dtype`` and a rank or prefix length ``size``."""
    if active_backend() == "reference":
        return Plan("reference", "backend('reference') was asked for")
    kind = device.type
    if kind == "cuda" or (active_backend() == "triton" and env.interpret()):
        reason = _kernels_missing(device) or _size_or_dtype(op, [dtype], size)
        if reason is None:
            return Plan("triton")
        return Plan("reference" if op == "prefix" else "accumulate", reason)
    if op == "prefix":
        if kind in ("cpu", "meta"):
            return Plan("blocked" if attention_dropout > 0 else "flash + merge")
        return Plan("reference", f"prefix attention has no plan for device {kind!r} yet")
    if kind in ("cpu", "meta"):
        return Plan("accumulate")
    return Plan("reference", f"{op} has no plan for device {kind!r}")


def unsupported(op: str, tensors: Sequence[Tensor], size: int) -> str | None:
    """Why the Triton kernels of ``op`` cannot take ``tensors``, or None."""
    # a context kernel's dropout state is int64 and may be on the CPU (``prefix_attention.gpu``)
    floating = [t for t in tensors if t.is_floating_point()]
    device, dtypes = floating[0].device, {t.dtype for t in floating}
    if len({t.device for t in floating}) > 1:
        return f"its tensors are on {sorted({str(t.device) for t in floating})}"
    reason = _kernels_missing(device) or _size_or_dtype(op, dtypes, size)
    if reason is not None:
        return reason
    if op == "prefix":
        dim, step = tensors[0].shape[-1], 16 // tensors[0].element_size()
        if dim > MAX_HEAD_DIM or (dim % step and device.type == "cuda"):
            return (
                f"the kernels take a head dim up to {MAX_HEAD_DIM} that {step} divides, got {dim}"
            )
    for t in floating:
        if t.dim() and t.stride(-1) != 1 and t.shape[-1] > 1 and t.numel():
            return f"the last dim of a tensor {tuple(t.shape)} has stride {t.stride(-1)}, not 1"
    return None


def _size_or_dtype(op: str, dtypes: Iterable[torch.dtype], size: int) -> str | None:
    what, most = ("prefix length", MAX_PREFIX) if op == "prefix" else ("rank", MAX_RANK)
    if not 1 <= size <= most:
        return f"the kernels take a {what} of 1 to {most}, got {size}"
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            return f"the kernels take float32, bfloat16 and float16, got {dtype}"
    return None


def _kernels_missing(device: torch.device) -> str | None:
    """Why no Triton kernel runs on ``device``, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'pelt_fast[triton]')"
    return _too_old(device.index or 0) if device.type == "cuda" else None


@functools.cache
def _too_old(index: int) -> str | None:
    if not env.has_gpu():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} is older than compute capability 8.0, which the kernels need"
    return None


def announce(op: str, device: torch.device) -> None:
    """Log once why ``op`` falls back to the reference; raise it under ``PELT_FAST_STRICT=1``.

    On CUDA the op itself logs this when it runs (``library.Op``).
    """
    if active_backend() == "reference" or device.type == "cuda":
        return
    reason = plan(op, device).reason
    if reason is not None:
        fall_back(f"{op}: running the reference, because {reason}")


def fall_back(message: str) -> None:
    """Log ``message`` once per process, or raise it under ``PELT_FAST_STRICT=1``."""
    if env.strict():
        raise RuntimeError(f"{message} (PELT_FAST_STRICT=1 makes this an error)")
    if not torch.compiler.is_compiling():
        _say_once(message)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
