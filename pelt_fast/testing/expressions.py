"""Parts that the plain PyTorch expressions share: dropout masks and the bottleneck."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common.dropout import draw_seed, dropout

from .case import Tensors

BOTTLENECK = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")


def seeds_for(x: Tensor, p: float, count: int) -> Tensor | None:
    """``count`` rows of dropout seeds, or None where p is 0."""
    return draw_seed(x.device, count) if p > 0 else None


def drop(x: Tensor, p: float, seeds: Tensor | None, row: int) -> Tensor:
    """The definition of the mask, differentiated by autograd."""
    return x if seeds is None else dropout(x, p, seeds[row])


def linear(t: Tensors, weight: str, bias: str) -> Callable[[Tensor], Tensor]:
    """A frozen layer as a function of its input."""
    return lambda x: F.linear(x, t[weight], t[bias])


def bottleneck_weights(k: int, n: int, r: int) -> Tensors:
    """Random weights of a bottleneck K -> R -> N."""
    return dict(down_weight=torch.randn(r, k) / k**0.5, down_bias=torch.randn(r),
                up_weight=torch.randn(n, r) / r**0.5, up_bias=torch.randn(n))  # fmt: skip


def bottleneck_update(x, t: Tensors, drop_hidden: Callable[[Tensor], Tensor]) -> Tensor:
    """drop(relu(x Dᵀ + d)) Uᵀ + u."""
    small = {name: t[name].to(x.dtype) for name in BOTTLENECK[:4]}
    h = drop_hidden(F.relu(F.linear(x, small["down_weight"], small["down_bias"])))
    return F.linear(h, small["up_weight"], small["up_bias"])
