"""The current backend: what the ops run."""

import importlib.util
import threading
from collections.abc import Iterator

from pelt_fast import env

from . import native, native_cuda

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")


def why_missing(name: str) -> str | None:
    """Why a backend cannot run here, or None."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'pelt_fast[triton]')"
        if not env.has_gpu() and not env.interpret():
            return "there is no GPU (TRITON_INTERPRET=1 interprets the kernels, slowly)"
        return None
    if name == "cpp":
        return native.why_missing()
    if name == "cuda":
        return native_cuda.why_missing()
    return None


def _checked(name: str, asked_by: str) -> str:
    """``name``, which must be a backend that can run here."""
    if name not in BACKENDS:
        raise ValueError(f"{asked_by} must be one of {BACKENDS}, got {name!r}")
    missing = why_missing(name)
    if missing is not None:
        raise RuntimeError(f"{asked_by} {name!r} cannot run here: {missing}")
    return name


class _Active(threading.local):
    """Each thread's backend: the one of the process until the thread chooses one."""

    def __init__(self, name: str):
        self.name = name


active = _Active(_checked(env.backend(), "PELT_FAST_BACKEND"))


def active_backend() -> str:
    """The name of the calling thread's backend; a Function keeps the one of its forward for
    backward."""
    return active.name


class backend:
    """Choose what the ops of the calling thread run.

    The choice acts at once. At the end of the block, ``with backend(...):`` restores the choice
    from before. Other threads keep their own choice. A thread without a choice runs the backend of
    ``PELT_FAST_BACKEND``, "auto" by default. A backward pass runs the backend of its forward pass,
    in any thread.

    Args:
        name: "auto", the best one present for the device; "triton", the Triton kernels ("auto" runs
            them on a GPU; on a CPU they are interpreted); "cuda", the CUDA C++ kernels for inputs
            that they take, else the Triton kernels; "cpp", the C++ ops, which must be built;
            "reference", the plain PyTorch specification.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run here; the message says why.

    Example:
        with pelt_fast.backend("reference"):
            expected = model(**batch).logits
    """

    def __init__(self, name: str):
        self.name = _checked(name, "backend")
        self.before, active.name = active.name, name

    def __enter__(self) -> "backend":
        active.name = self.name
        return self

    def __exit__(self, *exception) -> None:
        active.name = self.before


def backends() -> Iterator[tuple[str, str | None]]:
    """Each backend's name, and why it cannot run here (None if it can)."""
    return ((name, why_missing(name)) for name in BACKENDS)
