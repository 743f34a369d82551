"""A rank update onto a base: a kernel for bandwidth-bound ranks, above them the library's product.

Shapes   h (M, R), b (N, R), base (M, N), bias (N).
Maths    y = drop(base) + s (h bᵀ + bias)
Traffic  P = one read or write of the base. Up to the rank of ``config.fused_rank``: 2 P. Above it
         the product reads and writes y (2 P), after a pass for the dropout or the bias (2 P).
"""

import torch
from torch import Tensor

from .config import fused_rank
from .mask import dropout
from .rank_up import rank_up


def rank_update(
    h: Tensor,
    b: Tensor,
    base: Tensor,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Return y, in ``base`` or in a new tensor. ``seed`` is that of the base's dropout."""
    out = base if in_place else None
    if h.shape[1] <= fused_rank("rank_up", base.device):
        return rank_up(
            h, b, base, scale=scale, bias=bias, out=out, base_dropout_p=dropout_p, seed=seed
        )
    low, y = b.to(base.dtype).t(), base
    if seed is not None:
        y = dropout(base, dropout_p, seed, bias=bias, scale=scale, out=out)
    elif bias is not None:
        y = torch.add(base, bias.to(base.dtype), alpha=scale, out=out)
    elif not in_place:
        return torch.addmm(base, h, low, alpha=scale)
    return y.addmm_(h, low, alpha=scale)
