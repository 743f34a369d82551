"""Arguments of public functions: casts under autocast, and checks. An error names the argument, the
value it had and the values that are allowed."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .bundles import Bottleneck
from .dispatch import DTYPES
from .library import autocasts

Layer = Callable[[Tensor], Tensor]


def cast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as ``F.linear`` casts its arguments under ``torch.autocast``."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def tensor(
    name: str,
    value: Tensor | None,
    shape: tuple[int | str, ...],
    like: Tensor,
    optional: bool = False,
) -> None:
    """Check that ``value`` is a tensor of ``shape`` (a str dim is free) on ``like``'s device, or
    None if it is optional."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != len(shape) or any(
        want != have and not isinstance(want, str) for want, have in zip(shape, value.shape)
    ):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")


def activation_tensor(name: str, value: Tensor, least_dims: int = 2) -> None:
    """Check that ``value`` is a tensor of a dtype that the ops know, with enough dims."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} must be one of {known}, got {value.dtype}")
    if value.dim() < least_dims:
        raise ValueError(f"{name} must have at least {least_dims} dims, got {tuple(value.shape)}")


def function(name: str, value, optional: bool = False) -> None:
    """Check for a function, a frozen layer for example, or None if it is optional."""
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name} must be a function or a module, got {type(value).__name__}")


def same_dtype(like_name: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Check that frozen weights have the activation's dtype; only trainable ones may differ."""
    for name, value in tensors.items():
        if value is not None and value.dtype != like.dtype:
            raise TypeError(f"{name} must be {like.dtype} like {like_name}, got {value.dtype}")


def trainable_dtype(like: Tensor, **tensors: Tensor | None) -> None:
    """Check that trainable weights have at least the activation's precision."""
    for name, value in tensors.items():
        if value is None:
            continue
        if value.dtype not in DTYPES or value.dtype.itemsize < like.dtype.itemsize:
            raise TypeError(f"{name} must be {like.dtype} or wider, got {value.dtype}")


def frozen(**tensors: Tensor | None) -> None:
    """Check that no gradient is needed for these: the op computes none."""
    for name, value in tensors.items():
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which this function does not compute: call"
                f" {name}.requires_grad_(False), or compose the frozen layer and parallel_adapter"
            )


def update_scale(value: float | Tensor, channels: int) -> None:
    """Check for a finite number, or a learned scale of shape (), (1,) or (channels,)."""
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.numel() not in (1, channels):
            raise ValueError(
                f"scale must be a number or of shape (), (1,) or ({channels},),"
                f" got {tuple(value.shape)}"
            )
    elif not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"scale must be a finite number, got {value!r}")


def probability(name: str, value: float) -> None:
    """Check a dropout probability: in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


def choice(name: str, value: str, options: tuple[str, ...]) -> None:
    """Check that ``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")


def bottleneck(
    x: Tensor, channels: int, weights: Bottleneck, activation: str, scale: float | Tensor
) -> None:
    """Check the weights of an adapter that reads x and adds to ``channels`` of an output of x's
    dtype."""
    bottleneck_shapes(x, channels, weights, activation, scale)
    trainable_dtype(x, **weights._asdict())


def bottleneck_shapes(
    x: Tensor, channels: int, weights: Bottleneck, activation: str, scale: float | Tensor
) -> None:
    """Check everything of these weights but their dtype beside x's."""
    down_weight, down_bias, up_weight, up_bias = weights
    tensor("down_weight", down_weight, ("R", x.shape[-1]), x)
    rank = down_weight.shape[0]
    tensor("down_bias", down_bias, (rank,), x, optional=True)
    tensor("up_weight", up_weight, (channels, rank), x)
    tensor("up_bias", up_bias, (channels,), x, optional=True)
    same_dtype("down_weight", down_weight, down_bias=down_bias)
    same_dtype("up_weight", up_weight, up_bias=up_bias)
    update_scale(scale, channels)
    choice("activation", activation, ACTIVATIONS)


def layer_output(
    name: str, base: Tensor, x: Tensor, outputs: int | str, **weights: Tensor | None
) -> None:
    """Check what a layer returned for ``x``: its shape (``outputs`` may be free, as in
    :func:`tensor`), its dtype, and the dtype of the second half's weights beside it."""
    activation_tensor(name, base, 1)
    tensor(name, base, (*x.shape[:-1], outputs), x)
    trainable_dtype(base, **weights)


def checked_layer(
    name: str, layer: Layer, x: Tensor, outputs: int | str, **weights: Tensor | None
) -> Layer:
    """``layer``, whose output :func:`layer_output` checks."""

    def run(inputs: Tensor) -> Tensor:
        base = layer(inputs)
        layer_output(f"the output of {name}", base, x, outputs, **weights)
        return base

    return run
