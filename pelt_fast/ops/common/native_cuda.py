"""The CUDA C++ ops (csrc/cuda/): loaded once, or the reason why they are missing, and which inputs
they take."""

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from pelt_fast import env

MODULE = "pelt_fast._C_cuda"  # MODULE of csrc/nvcc.py
MAX_TAIL_RANK = 1024  # fits() of csrc/cuda/tail_gemm.cu
MAX_ONE_PASS_RANK = 64  # rank_backward() of csrc/cuda/rank_backward.cu
ALIGNED = 8  # elements: 16 bytes


@functools.cache
def why_missing() -> str | None:
    """Why the CUDA C++ ops are missing, or None; the first call loads them."""
    found = find_spec(MODULE)  # found but not imported: it is a library of ops, not a Python module
    if found is None:
        return "the package was installed without the CUDA C++ ops (its build said why)"
    if not env.has_gpu():
        return "torch sees no GPU"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"they do not load: {error}"
    return None


def ops():
    """``torch.ops.pelt_fast_cuda``. For a wrong argument an op raises RuntimeError, which
    names the argument, its value and what is allowed."""
    return torch.ops.pelt_fast_cuda


def covers_tail(x: Tensor, weight: Tensor, rank: int) -> bool:
    """Whether the Hopper tail GEMM takes x (M, K), ``weight`` (N, K) and a rank, forward and
    backward."""
    return (
        _is_covered(x)
        and weight.is_contiguous()
        and rank <= MAX_TAIL_RANK
        and _are_aligned(*weight.shape, rank)
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def covers_one_pass(dy: Tensor, rank: int) -> bool:
    """Whether the one-pass gradients of a rank update take dy (M, N) and a rank."""
    return _is_covered(dy) and rank <= MAX_ONE_PASS_RANK and _are_aligned(dy.shape[1], rank)


def _are_aligned(*sizes: int) -> bool:
    return all(size % ALIGNED == 0 for size in sizes)


def _is_covered(x: Tensor) -> bool:
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() > 0
        and x.stride(-1) == 1
        and _are_aligned(x.stride(0) if x.shape[0] > 1 else 0)
        and x.data_ptr() % 16 == 0
        and why_missing() is None
    )
