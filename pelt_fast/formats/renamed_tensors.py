"""Tensor names of earlier versions, and their names today."""

from torch import Tensor

from pelt_fast.layouts.names import is_method

_TODAY = {"norm_weight": "norm.weight", "norm_bias": "norm.bias"}  # of an adapter's LayerNorm


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names."""
    return {_today(name): tensor for name, tensor in tensors.items()}


def _today(name: str) -> str:
    path, _, last = name.rpartition(".")
    return f"{path}.{_TODAY[last]}" if is_method(name) and last in _TODAY else name
