"""The C++ ops: loaded once, with the reason where they are not here."""

import functools

import torch


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


def dropout_factor(
    out: torch.Tensor, threshold: int, scale: float, seed: torch.Tensor, start: int
) -> torch.Tensor:
    """Fill ``out`` (contiguous, CPU) with ``scale`` where the dropout mask keeps elements
    ``start`` and on, else 0 (reference/philox.py). Raises RuntimeError that names the argument."""
    return torch.ops.pelt_fast_cpp.dropout_factor_(out, threshold, scale, seed, start)
