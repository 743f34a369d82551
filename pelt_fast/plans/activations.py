"""The functions of ``reference.activations`` with all that stands around them: gate and dropout.

One pass in C++ (csrc/cpu/activation.cpp); without it torch's elementwise kernels, one pass each.
"""

import torch
from torch import Tensor

from pelt_fast.ops import native
from pelt_fast.reference.activations import ACTIVATIONS

from .blocks import drop_


def _native(t: Tensor, p: float, seed: Tensor | None) -> tuple | None:
    """The mask as the C++ takes it, or None where it does not take t."""
    return native.mask(p, seed) if native.covers_rows(t) else None


def activate(
    name: str,
    t: Tensor,
    out: Tensor | None = None,
    *,
    linear: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """drop(f(t) * linear), t (M, N), in ``out`` where given, else as a new contiguous tensor.

    ``out`` may be t, or ``linear`` where t is ours: it may then be written to.
    """
    if out is None:
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
    # a copy, and the normal distribution to 16 bits, are quicker in torch
    as_is = name == "identity" and linear is None and seed is None
    by_torch = as_is or (name == "gelu" and t.element_size() == 2)
    mask = None if by_torch else _native(t, p, seed)
    if mask is not None:
        return native.ops().activate_(out, t, linear, ACTIVATIONS.index(name), *mask)
    if linear is None:
        return drop_(_library(name, t, out), p, seed)
    over_linear = out.data_ptr() == linear.data_ptr()
    torch.mul(_library(name, t, t if over_linear else out), linear, out=out)
    return drop_(out, p, seed)


def _library(name: str, t: Tensor, out: Tensor) -> Tensor:
    aten = torch.ops.aten
    if name == "relu":
        return torch.clamp_min(t, 0, out=out)
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu.out(t, approximate="tanh" if name == "gelu_tanh" else "none", out=out)
    if name == "silu":
        return aten.silu.out(t, out=out)
    if name == "tanh":
        return torch.tanh(t, out=out)
    return out.copy_(t)


def activation_backward(
    name: str,
    grad: Tensor,
    t: Tensor,
    *,
    linear: Tensor | None = None,
    dt: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """drop(grad) f'(t), written over ``grad``, which must be ours.

    Of a gated unit ``dt`` gets drop(grad) linear f'(t), and ``grad`` becomes drop(grad) f(t), the
    gradient of ``linear``.
    """
    mask = None if name == "identity" and linear is None and seed is None else _native(t, p, seed)
    if mask is not None:
        return native.ops().activate_backward_(grad, t, linear, dt, ACTIVATIONS.index(name), *mask)
    drop_(grad, p, seed)
    if linear is None:
        return _library_backward(name, grad, t)
    _library_backward(name, torch.mul(grad, linear, out=dt), t)
    return grad.mul_(activate(name, t))


def _library_backward(name: str, grad: Tensor, t: Tensor) -> Tensor:
    aten = torch.ops.aten
    if name == "relu":
        aten.threshold_backward.grad_input(grad, t, 0, grad_input=grad)
    elif name == "gelu":
        aten.gelu_backward.grad_input(grad, t, approximate="none", grad_input=grad)
    elif name == "gelu_tanh":
        aten.gelu_backward.grad_input(grad, t, approximate="tanh", grad_input=grad)
    elif name == "silu":
        aten.silu_backward.grad_input(grad, t, grad_input=grad)
    elif name == "tanh":
        aten.tanh_backward.grad_input(grad, torch.tanh(t), grad_input=grad)
    return grad
