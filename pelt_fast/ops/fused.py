"""What an op runs on CUDA: its Triton kernels, or with a stated reason the plan below them."""

import importlib
from collections.abc import Callable

import torch
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
        fused = getattr(importlib.import_module(f"pelt_fast.fused.{module}"), name)
        # Triton launches on the current device, which need not be that of the tensors
        with torch.cuda.device_of(tensors[0]):
            return fused(*args)

    run.__name__ = f"{name}_cuda"
    return run
