"""The functions of ``reference.activations`` by torch's own elementwise kernels, one pass each."""

import torch
from torch import Tensor
from torch.nn import functional as F


def activate(name: str, t: Tensor) -> Tensor:
    """f(t) as a new contiguous tensor."""
    if name == "identity":
        return t.clone(memory_format=torch.contiguous_format)
    if name == "relu":
        return F.relu(t)
    if name == "gelu":
        return F.gelu(t)
    if name == "gelu_tanh":
        return F.gelu(t, approximate="tanh")
    if name == "silu":
        return F.silu(t)
    return torch.tanh(t)


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
