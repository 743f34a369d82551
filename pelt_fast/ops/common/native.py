"""The C++ ops (csrc/): loaded once, with the reason where they are not here."""

import functools

import torch
from torch import Tensor


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

    return {"compiler": _C.compiler(), "instruction set": _C.level()}


def ops():
    """``torch.ops.pelt_fast_cpp``. An op that is given a wrong argument raises RuntimeError that
    names it, what came and what was wanted."""
    return torch.ops.pelt_fast_cpp


def dropout_factor(out: Tensor, threshold: int, scale: float, seed: Tensor, start: int) -> Tensor:
    """Fill ``out`` (contiguous, CPU) with ``scale`` where the dropout mask keeps elements
    ``start`` and on, else 0 (dropout.py)."""
    return ops().dropout_factor_(out, threshold, scale, seed, start)
