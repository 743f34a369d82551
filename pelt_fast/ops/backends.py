"""The backend in force: what the ops run."""

import importlib.util
from collections.abc import Iterator

from pelt_fast import env

from . import native, native_cuda

BACKENDS = ("auto", "reference", "cpp", "triton", "cuda")
_active = "auto"


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


def active_backend() -> str:
    """The name of the backend in force; a Function keeps the one of its forward for backward."""
    return _active


class backend:
    """Choose what the ops run: ``with backend("reference"): ...``, or ``backend("auto")`` alone.

    ``"auto"`` is the best that is present for the device, ``"triton"`` the Triton kernels (what
    ``"auto"`` runs on a GPU; on a CPU where they are interpreted), ``"cuda"`` the CUDA C++ kernels
    where they take the input and the Triton kernels elsewhere, ``"reference"`` the plain PyTorch
    specification. Takes effect when created; leaving a ``with`` block restores what was
    before. Raises ValueError for an unknown name, RuntimeError with the reason for one that is not
    here.
    """

    def __init__(self, name: str):
        global _active
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
        missing = why_missing(name)
        if missing is not None:
            raise RuntimeError(f"backend {name!r} cannot run here: {missing}")
        self.before, _active = _active, name

    def __enter__(self) -> "backend":
        return self

    def __exit__(self, *exception) -> None:
        global _active
        _active = self.before


def backends() -> Iterator[tuple[str, str | None]]:
    """Each backend's name and why it is not here (None when it is)."""
    return ((name, why_missing(name)) for name in BACKENDS)
