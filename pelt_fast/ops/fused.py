"""What an op runs on CUDA: its Triton kernels, or with a stated reason the plan below them."""

import importlib
from collections.abc import Callable

from torch import Tensor

from . import support


def fused_or_plan(op: str, path: str, plan: Callable, size: Callable[[tuple], int]) -> Callable:
    """An implementation that runs ``pelt_fast.fused.<path>`` where the kernels support the input.

    ``size`` reads the rank (or the prefix length) off the arguments. Triton is imported on the
    first call. The reason for running ``plan`` instead is said once, or raised under strict.
    """
    module, name = path.split(".")

    def run(*args):
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        reason = support.unsupported(op, tensors, size(args))
        if reason is not None:
            support.fall_back(f"{op}: running on library kernels, because {reason}")
            return plan(*args)
        return getattr(importlib.import_module(f"pelt_fast.fused.{module}"), name)(*args)

    run.__name__ = f"{name}_cuda"
    return run
