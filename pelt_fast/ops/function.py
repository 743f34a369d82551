"""What the public functions call: an op's autograd Function, or the op alone."""

import torch
from torch import Tensor


class OpFunction(torch.autograd.Function):
    """A Function whose op can also run without what a backward would read.

    ``infer`` takes the arguments of ``forward`` and returns the output; nothing is kept, and what
    only a backward needs is not made.
    """

    @staticmethod
    def infer(*args) -> Tensor:
        raise NotImplementedError


def run(function: type[OpFunction], *args) -> Tensor:
    """``function`` of ``args``: differentiable where a gradient may be asked for."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return function.apply(*args)
    return function.infer(*args)
