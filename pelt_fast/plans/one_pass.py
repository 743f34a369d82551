"""An adapter in one pass each way, in C++ (csrc/cpu/adapter.cpp): the bottleneck stays in cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.ops import native
from pelt_fast.reference.activations import ACTIVATIONS
from pelt_fast.reference.low_rank import empty_like_nothing


def takes_forward(x: Tensor, residual: Tensor, rank: int) -> bool:
    """Whether it is the quickest: products that round to 16 bits are quicker in the library."""
    return x.element_size() == 4 and takes_backward(x, residual, rank)


def takes_backward(dy: Tensor, x: Tensor, rank: int) -> bool:
    """Whether the op takes dy (M, N), x (M, K) and a rank."""
    return native.covers(dy, rank) and native.covers(x, rank)


def adapter_forward(
    x: Tensor,
    residual: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    keep_t: bool,
) -> tuple[Tensor, Tensor]:
    """y and, where it is kept, t."""
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    t = x.new_empty(x.shape[0], down_weight.shape[0]) if keep_t else None
    weights = map(native.weight, (down_weight, down_bias, up_weight, up_bias))
    native.ops().adapter_(
        y, t, x, residual, *weights, scale, ACTIVATIONS.index(activation),
        *native.mask(dropout_p, seed),
    )  # fmt: skip
    return y, t if keep_t else empty_like_nothing(x)


def adapter_backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    activation: str,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    sequential: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, down_weight, down_bias, up_weight and up_bias; what is not needed is
    ``empty_like_nothing``."""
    like = (down_weight, down_weight[:, 0], up_weight, up_weight[:, 0])
    dx = x.new_empty(x.shape) if needs[0] else None
    found = [
        torch.empty(weight.shape, dtype=torch.float32) if needed else None
        for weight, needed in zip(like, needs[1:5], strict=True)
    ]
    native.ops().adapter_backward_(
        dy, x, t, native.weight(down_weight), native.weight(up_weight),
        dy if sequential and needs[0] else None, dx, *found, scale, ACTIVATIONS.index(activation),
        *native.mask(dropout_p, seed),
    )  # fmt: skip
    nothing = empty_like_nothing(dy)
    grads = (None if d is None else d.to(weight.dtype) for d, weight in zip(found, like))
    return tuple(nothing if grad is None else grad for grad in (dx, *grads))
