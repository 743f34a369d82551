"""The ``pelt_fast::`` op library: schemas, the floor, the backend in force.

Every op is defined once. Its reference is registered under CompositeExplicitAutograd and is the
floor: it runs on any device no backend registered for. Plans and kernels register under CPU and
CUDA. Ops are opaque to autograd and torch.compile; the Functions beside them differentiate.
"""

from collections.abc import Callable, Iterator

import torch

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_MISSING = {
    "cpp": "the C++ ops are not part of this version",
    "triton": "the Triton kernels are not part of this version",
    "cuda": "the CUDA kernels are not part of this version",
}

_LIBRARY = torch.library.Library("pelt_fast", "DEF")
_active = "auto"


class Op:
    """One op: called, it runs what the backend in force says."""

    def __init__(self, name: str, schema: str, reference: Callable, fake: Callable):
        _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pelt_fast::{name}", fake, lib=_LIBRARY)
        self.name = name
        self.reference = reference
        self.dispatched = getattr(torch.ops.pelt_fast, name).default

    def register(self, implementation: Callable, *keys: str) -> None:
        """Register a plan or kernel under dispatch keys, ``"CPU"`` or ``"CUDA"``."""
        for key in keys:
            _LIBRARY.impl(self.name, implementation, key)

    def __call__(self, *args, backend: str):
        return self.reference(*args) if backend == "reference" else self.dispatched(*args)


def active_backend() -> str:
    """The name of the backend in force; a Function keeps the one of its forward for backward."""
    return _active


class backend:
    """Choose what the ops run: ``with backend("reference"): ...``, or ``backend("auto")`` alone.

    ``"auto"`` is the best that is present for the device, ``"reference"`` the plain PyTorch
    specification. Takes effect when created; leaving a ``with`` block restores what was before.
    Raises ValueError for an unknown name, RuntimeError with the reason for one that is not here.
    """

    def __init__(self, name: str):
        global _active
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
        if name in _MISSING:
            raise RuntimeError(f"backend {name!r} cannot run here: {_MISSING[name]}")
        self.before, _active = _active, name

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *exception) -> None:
        global _active
        _active = self.before


def backends() -> Iterator[tuple[str, str | None]]:
    """Each backend's name and why it is not here (None when it is)."""
    return ((name, _MISSING.get(name)) for name in BACKENDS)
