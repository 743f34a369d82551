"""Run a case on a backend and judge it by the fp64 oracle."""

import torch

from pelt_fast.ops.common.backends import backend

from .case import Case, Tensors, run
from .verdict import Verdict, compare


def judge(case: Case, backend_name: str, dtype: torch.dtype, device="cpu") -> Verdict:
    """Run ``case`` on a backend and compare output and every gradient with the fp64 oracle."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = case.tensors(dtype, wide, device)
    with backend(backend_name):
        actual = run(case.call, tensors)
    same_dtype = run(case.expression, tensors)
    oracle = run(case.expression, case.tensors(dtype, wide, device) | doubled(tensors))
    return compare(actual, same_dtype, oracle, dtype)


def doubled(tensors: Tensors) -> Tensors:
    """The floating tensors in fp64, leaves again."""
    return {
        name: value.detach().double().requires_grad_(value.requires_grad)
        for name, value in tensors.items()
        if value.is_floating_point()
    }


def has_its_own_mask(case: Case, backend_name: str, device) -> bool:
    """Whether ``case`` has a dropout mask that the oracle cannot compute: on a GPU the library
    kernel makes the mask of attention dropout."""
    on_gpu = torch.device(device).type == "cuda" and backend_name != "reference"
    return on_gpu and case.op == "prefix" and "p=0.0" not in case.name
