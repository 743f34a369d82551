"""The C++ ops (csrc/): loaded once, with the reason where they are not here."""

import functools

import torch
from torch import Tensor

from pelt_fast.reference.philox import keep_scale, threshold

MAX_RANK = 128  # kMaxRank of csrc/cpu/tile.h
MAX_PREFIX, MAX_HEAD_DIM = 256, 128  # kMaxPrefix and kColumns
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def why_missing() -> str | None:
    """Why the C++ ops are not here, or None; the first call loads them."""
    try:
        from pelt_fast import _C  # noqa: F401
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return "the package was installed without them (its build said why)"
        return f"they do not load: {error}"
    return None


def facts() -> dict[str, str]:
    """How the ops were built and what they use here; empty where they are not."""
    if why_missing() is not None:
        return {}
    from pelt_fast import _C

    return {"compiler": _C.compiler(), "instruction set": _C.instruction_set()}


def ops():
    """``torch.ops.pelt_fast_cpp``. An op that is given a wrong argument raises RuntimeError that
    names it, what came and what was wanted."""
    return torch.ops.pelt_fast_cpp


def covers(x: Tensor, rank: int) -> bool:
    """Whether the rank ops take an activation x (M, K) and a rank."""
    return covers_rows(x) and 1 <= rank <= MAX_RANK


def covers_prefix(q: Tensor, length: int) -> bool:
    """Whether the prefix ops take queries (B, H, T, D) and a prefix length."""
    return covers_rows(q) and 1 <= length <= MAX_PREFIX and q.shape[-1] <= MAX_HEAD_DIM


def covers_rows(x: Tensor) -> bool:
    """Whether the ops take a tensor of x's device, dtype and last stride."""
    ours = x.device.type == "cpu" and x.dtype in DTYPES and x.stride(-1) == 1 and x.numel() > 0
    return ours and why_missing() is None


def dropout_factor(out: Tensor, threshold: int, scale: float, seed: Tensor, start: int) -> Tensor:
    """Fill ``out`` (contiguous, CPU) with ``scale`` where the dropout mask keeps elements
    ``start`` and on, else 0 (reference/philox.py)."""
    return ops().dropout_factor_(out, threshold, scale, seed, start)


def mask(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """A dropout mask as the C++ takes it."""
    return (None, 0, 1.0) if seed is None else (seed, threshold(p), keep_scale(p))


def weight(tensor: Tensor | None) -> Tensor | None:
    """A trainable weight as the C++ reads it."""
    return None if tensor is None else tensor.detach().float()
