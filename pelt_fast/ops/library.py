"""The ``pelt_fast::`` op library: schemas and the floor.

Every op is defined once. Its reference is registered under CompositeExplicitAutograd and is the
floor: it runs on any device no backend registered for. Plans register under CPU, the Triton kernels
under CUDA. Ops are opaque to autograd and torch.compile; the Functions beside them differentiate.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pelt_fast import env
from pelt_fast.kernels import config

_LIBRARY = torch.library.Library("pelt_fast", "DEF")


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor`` (meta tensors know none)."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


class Op:
    """One op: called, it runs what the backend in force says."""

    def __init__(self, name: str, schema: str, reference: Callable, fake: Callable):
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pelt_fast::{name}", fake, lib=_LIBRARY)
        self.name = name
        self.reference = reference
        self.plan: Callable | None = None
        self.triton: Callable | None = None
        self.dispatched = getattr(torch.ops.pelt_fast, name).default

    def register(self, plan: Callable, triton: Callable) -> None:
        """Register the plan of the CPU, and what runs the Triton kernels on CUDA."""
        self.plan, self.triton = plan, triton
        _LIBRARY.impl(self.name, plan, "CPU")
        _LIBRARY.impl(self.name, triton, "CUDA")

    def __call__(self, *args, backend: str):
        if autocasts(args[0]):
            # what an op computes in is its own: autocast has acted on what it was given
            with torch.autocast(args[0].device.type, enabled=False):
                return self._run(args, backend)
        return self._run(args, backend)

    def _run(self, args: tuple, backend: str):
        if backend == "reference":
            return self.reference(*args)
        if backend == "triton" and env.interpret():
            return self.triton(*args)
        if backend == "cuda":
            with config.cuda_kernels():
                return self.dispatched(*args)
        return self.dispatched(*args)
