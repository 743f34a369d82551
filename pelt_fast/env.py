"""Every environment variable the package reads, and what the machine has."""

import os

import torch


def strict() -> bool:
    """``PELT_FAST_STRICT`` (default 0): 1 turns every fallback to the reference into an error."""
    return os.environ.get("PELT_FAST_STRICT", "0") == "1"


def backend() -> str:
    """``PELT_FAST_BACKEND`` (default auto): the backend of threads that choose none."""
    return os.environ.get("PELT_FAST_BACKEND", "auto")


def interpret() -> bool:
    """``TRITON_INTERPRET`` (default 0): Triton's own; 1 interprets the kernels, also on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()
