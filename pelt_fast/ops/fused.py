"""What an op runs on CUDA: its Triton kernels, or with a stated reason the plan below them."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from . import support


def fused_or_plan(
    op: str,
    path: str,
    plan: Callable,
    size: Callable[[tuple], int],
    frozen: tuple[int, ...] = (),
) -> Callable:
    """An implementation that runs ``pelt_fast.fused.<path>`` where the kernels support the input.

    ``size`` reads the rank (or the prefix length) off the arguments; ``frozen`` are the places of
    weights that only GEMMs read, of any strides (GPT-2 keeps its own transposed). Triton is
    imported on the first call. The reason for running ``plan`` instead is said once, or raised
    under strict.
    """
    module, name = path.split(".")

    def run(*args):
        tensors = [
            _upright(arg) if i in frozen else arg
            for i, arg in enumerate(args) if isinstance(arg, Tensor)
        ]  # fmt: skip
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


def _upright(weight: Tensor) -> Tensor:
    """A transposed matrix the other way round."""
    return weight.t() if weight.dim() == 2 and weight.stride(0) == 1 else weight
