"""How far two results of one computation may be apart: rounding errors, and no more."""

import torch
from torch import Tensor

# multiples of eps, of the norm of a layer's or a model's whole output: many sums in 32 bits, few
# roundings in 16
_ROUNDINGS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}


def relative_error(wanted: Tensor, found: Tensor) -> float:
    """Norm of the error over norm of what is wanted; infinite for another shape or a NaN."""
    if wanted.shape != found.shape:
        return torch.inf
    error = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else torch.inf


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error that rounding may make in ``dtype``."""
    return _ROUNDINGS.get(dtype, 64) * torch.finfo(dtype).eps


def is_off(wanted: Tensor, found: Tensor) -> bool:
    """Whether more than rounding errors are between two results."""
    return relative_error(wanted, found) > rounding(wanted.dtype)
