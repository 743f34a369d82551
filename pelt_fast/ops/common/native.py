"""The C++ ops (csrc/): loaded once, or the reason why they are missing."""

import functools

import torch


@functools.cache
def why_missing() -> str | None:
    """Why the C++ ops are missing, or None; the first call loads them."""
    try:
        from pelt_fast import _C  # noqa: F401
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return "the package was installed without them (its build said why)"
        return f"they do not load: {error}"
    return None


def facts() -> dict[str, str]:
    """How the ops were built and what they use here; empty if they are missing."""
    if why_missing() is not None:
        return {}
    from pelt_fast import _C

    return {"compiler": _C.compiler(), "instruction set": _C.instruction_set()}


def ops():
    """``torch.ops.pelt_fast_cpp``. For a wrong argument an op raises RuntimeError, which
    names the argument, its value and what is allowed."""
    return torch.ops.pelt_fast_cpp
