"""A case: one op on one input, and the result of the op."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One op on one input: ``call`` is ours, ``expression`` the same in plain PyTorch.

    ``make(dtype)`` gives the tensors by name; those in ``trainable`` stay fp32 beside a
    low-precision activation. Tensors that require a gradient are compared in theirs.
    """

    op: str
    name: str
    make: Callable[[], Tensors]
    call: Callable[[Tensors], Tensor]
    expression: Callable[[Tensors], Tensor]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...] = ()

    def tensors(self, dtype: torch.dtype, wide: torch.dtype, device="cpu") -> Tensors:
        """The inputs: activations and frozen weights in ``dtype``, the trainable in ``wide``,
        rounded to ``dtype`` first so that every precision sees the same numbers."""
        result = {}
        generator = torch.random.get_rng_state()
        torch.manual_seed(1)
        for name, value in self.make().items():
            if value.is_floating_point():
                value = value.to(dtype)
                value = value.to(wide if name in self.trainable else dtype)
                value.requires_grad_(name not in self.frozen)
            result[name] = value.to(device)
        torch.random.set_rng_state(generator)
        return result


def run(function: Callable[[Tensors], Tensor], tensors: Tensors) -> Tensors:
    """Output and gradients of ``function`` for a fixed seed and output gradient."""
    leaves = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in tensors.items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        y = function(leaves)
        torch.manual_seed(3)
        dy = torch.randn(y.shape, dtype=torch.float32).to(y)
    wanted = {name: value for name, value in leaves.items() if value.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach(), **{f"d_{n}": g for n, g in zip(wanted, grads, strict=True)}}
