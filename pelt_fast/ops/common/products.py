"""The product behind every weight gradient, for the specification."""

import torch
from torch import Tensor


def outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``leftᵀ right`` (weight gradient), accumulated and returned in at least ``dtype``."""
    wide = torch.promote_types(left.dtype, dtype)
    return (left.to(wide).t() @ right.to(wide)).to(dtype)
