"""The functions of ``reference.activations`` by torch's own elementwise kernels, one pass each."""

import torch
from torch import Tensor


def activate(name: str, t: Tensor, out: Tensor | None = None) -> Tensor:
    """f(t), in ``out`` where given (t itself: in place), else as a new contiguous tensor."""
    aten = torch.ops.aten
    if out is None:
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
    if name == "relu":
        return torch.clamp_min(t, 0, out=out)
    if name in ("gelu", "gelu_tanh"):
        return aten.gelu.out(t, approximate="tanh" if name == "gelu_tanh" else "none", out=out)
    if name == "silu":
        return aten.silu.out(t, out=out)
    if name == "tanh":
        return torch.tanh(t, out=out)
    return out.copy_(t)


def activation_backward(name: str, grad: Tensor, t: Tensor) -> Tensor:
    """``grad * f'(t)``, written over ``grad``, which must be ours."""
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
