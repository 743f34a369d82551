"""The error budget: at most twice PyTorch's own error, and a rounding band."""

from dataclasses import dataclass

import torch

from .case import Tensors

ROUNDING_BAND = 4  # units of eps * the oracle's largest magnitude


@dataclass(frozen=True)
class Verdict:
    """The worst tensor of one comparison: its error and budget, relative to the oracle's
    largest magnitude."""

    tensor: str
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether every tensor is finite and inside its budget."""
        return self.error <= self.budget


def compare(actual: Tensors, same_dtype: Tensors, oracle: Tensors, dtype: torch.dtype) -> Verdict:
    """Judge ``actual`` by the budget; the verdict of the tensor nearest to (or past) its own."""
    worst = None
    for name, exact in oracle.items():
        if exact.numel() == 0:
            continue
        size = exact.abs().max().item() or 1.0
        error = (actual[name].double() - exact).abs().max().item() / size
        torchs = (same_dtype[name].double() - exact).abs().max().item() / size
        if not torch.isfinite(actual[name]).all():
            error = float("inf")
        verdict = Verdict(name, error, 2 * torchs + ROUNDING_BAND * torch.finfo(dtype).eps)
        if worst is None or verdict.error / verdict.budget > worst.error / worst.budget:
            worst = verdict
    return worst
