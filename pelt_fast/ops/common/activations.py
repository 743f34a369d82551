"""The elementwise functions f of docs/maths.md#i1 and their derivatives, by hand."""

import math

import torch
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "tanh")

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def activate(name: str, t: Tensor) -> Tensor:
    """f(t)."""
    if name == "identity":
        return t
    if name == "relu":
        return t.clamp_min(0)
    if name == "gelu":
        return 0.5 * t * (1 + torch.erf(t * _SQRT_HALF))
    if name == "gelu_tanh":
        return 0.5 * t * (1 + torch.tanh(_SQRT_2_PI * (t + _CUBIC * t**3)))
    if name == "silu":
        return t * torch.sigmoid(t)
    if name == "tanh":
        return torch.tanh(t)
    raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")


def derivative(name: str, t: Tensor) -> Tensor:
    """f'(t); ReLU's is 0 at 0, as in torch."""
    if name == "identity":
        return torch.ones_like(t)
    if name == "relu":
        return (t > 0).to(t.dtype)
    if name == "gelu":
        density = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(t * _SQRT_HALF)) + t * density
    if name == "gelu_tanh":
        inner = torch.tanh(_SQRT_2_PI * (t + _CUBIC * t**3))
        slope = _SQRT_2_PI * (1 + 3 * _CUBIC * t * t)
        return 0.5 * (1 + inner) + 0.5 * t * (1 - inner * inner) * slope
    if name == "silu":
        gate = torch.sigmoid(t)
        return gate * (1 + t * (1 - gate))
    if name == "tanh":
        return 1 - torch.tanh(t) ** 2
    raise ValueError(f"activation must be one of {ACTIVATIONS}, got {name!r}")
