"""Inputs and the budget of the kernel tests."""

from collections.abc import Callable

import torch
from torch import Tensor

from pelt_fast import env

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPILED = DEVICE.type == "cuda"
# the interpreter computes bf16 wrongly (docs/facts.md); a GPU, and tests/ptx, run compiled kernels
DTYPES = [torch.float32, torch.float16] + ([] if env.interpret() else [torch.bfloat16])
BAND = 4
watched: Callable[[float], object] = float  # called with each error over its budget
SEED = (0x1234_5678_9ABC_DEF0, 0x0FED_CBA9_8765_4321)


def sliced(*shape: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    """Random numbers (rounded to dtype) in the middle of a wider tensor: strided, unaligned."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3, device=DEVICE) * scale
    return wide.to(dtype)[..., 1 : 1 + shape[-1]]


def dense(*shape: int, dtype=torch.float32, scale: float = 1.0) -> Tensor:
    """Random numbers, contiguous."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def seed() -> Tensor:
    """A fixed dropout seed with all 128 bits in use."""
    return torch.tensor(SEED, dtype=torch.int64, device=DEVICE)


def check(
    actual: Tensor, same_dtype: Tensor, oracle: Tensor, low: torch.dtype, known: float = 0.0
) -> None:
    """At most twice torch's own error in the same dtype, and a rounding band. ``known``: the error
    of a kernel of torch's own that is the larger one."""
    assert actual.shape == oracle.shape, (actual.shape, oracle.shape)
    assert torch.isfinite(actual).all(), "not finite: an element was not written, or overflowed"
    error, torchs = _error(actual, oracle), max(known, _error(same_dtype, oracle))
    budget = _budget(torchs, low)
    watched(error / budget)
    assert error <= budget, f"error {error:.2e} of {budget:.2e} (torch {torchs:.2e})"


def check_shows(broken: Tensor, same_dtype: Tensor, oracle: Tensor, low: torch.dtype) -> None:
    """The inputs show a fault: ``broken``, what a kernel with it gives, is out of the budget."""
    error, budget = _error(broken, oracle), _budget(_error(same_dtype, oracle), low)
    assert error > budget, f"error {error:.2e} is within {budget:.2e}: nobody would see it"


def _error(found: Tensor, oracle: Tensor) -> float:
    return (found.double() - oracle).abs().max().item() / max(oracle.abs().max().item(), 1e-30)


def _budget(torchs: float, low: torch.dtype) -> float:
    return 2 * torchs + BAND * torch.finfo(low).eps
