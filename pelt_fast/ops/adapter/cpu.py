"""The adapter on the C++ passes, or on the library's GEMMs if there is no C++.

Shapes and maths are those of ``reference``.
Traffic  P = one read or write of an M x K (or M x N) activation. In brackets: with the C++ passes.
         These run forward and backward in one pass each (csrc/cpu/adapter.cpp), the bottleneck in
         cache.
         forward   x for T, base, y written, read and written again:             5 P (2-3)
         backward  dy for dH, dU and du, x for dD, dx written; sequential: dy again
                                                                                 5-6 P (3)
The specification runs a LayerNorm on the update, and a LayerNorm wider than its input.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common import gemm
from pelt_fast.ops.common.activations import ACTIVATIONS
from pelt_fast.ops.common.bundles import (
    LAYER_NORM_EPS,
    AdapterNorm,
    Bottleneck,
    Transform,
    absent,
)
from pelt_fast.ops.common.dropout import cpp_mask, row_blocks
from pelt_fast.ops.common.gradients import bottleneck_gradients, down_gradients, fill
from pelt_fast.ops.common.passes import (
    activate,
    covers,
    cpp,
    cpp_weight,
    down,
    few_update,
    library_is_faster,
    linear,
    takes_few,
    up,
)


def adapter_forward(
    x: Tensor,
    base: Tensor | None,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    keep_t: bool,
) -> tuple[Tensor, Tensor]:
    residual = x if base is None else base
    normed = norm.layer_norm == "in"
    if norm.layer_norm == "out" or (normed and x.dtype != norm.norm_weight.dtype):
        return NotImplemented
    if transform.seed is None and takes_few(x, adapter):
        t = x.new_empty(x.shape[0], adapter.down_weight.shape[0]) if keep_t else None
        return _few_forward(x, residual, adapter, norm, transform, t), absent(x) if t is None else t
    rank = adapter.down_weight.shape[0]
    if not normed and _in_one_pass(x, residual, rank, transform.seed):
        return _forward_in_one_pass(x, residual, adapter, transform, keep_t)
    t = _normed_down(x, adapter, norm) if normed else down(x, *adapter[:2])
    h = activate(transform.activation, t, p=transform.dropout_p, seed=transform.seed)
    out = up(residual, h, adapter.up_weight, adapter.up_bias, transform.scale)
    return out, t if keep_t else absent(t)


def _few_forward(
    x: Tensor,
    residual: Tensor,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    t: Tensor | None = None,
) -> Tensor:
    """A few rows without dropout, in one call behind the LayerNorm; ``t`` receives T."""
    if norm.layer_norm == "in":
        x = F.layer_norm(x, x.shape[1:], norm.norm_weight, norm.norm_bias, LAYER_NORM_EPS)
    return few_update(residual, x, adapter, transform.scale, transform.activation, t)


def adapter_step(
    x: Tensor, adapter: Bottleneck, norm: AdapterNorm, transform: Transform
) -> Callable | None:
    """What runs inputs of the shape of x (..., K) without autograd and dropout, checked here once;
    None if C++ does not take them."""
    inputs, outputs = x.shape[-1], adapter.up_weight.shape[0]
    known = norm.layer_norm == "none" or (
        norm.layer_norm == "in" and norm.norm_weight.dtype is x.dtype
    )
    if not known or not takes_few(x.reshape(-1, inputs), adapter):
        return None

    def step(x: Tensor, base: Tensor | None) -> Tensor:
        residual, x = x if base is None else base, x.reshape(-1, inputs)
        y = _few_forward(x, residual.reshape(-1, outputs), adapter, norm, transform)
        return y.view(residual.shape)

    return step


def _normed_down(x: Tensor, adapter: Bottleneck, norm: AdapterNorm) -> Tensor:
    """T of the LayerNorm's output, a block of rows at a time, read while it is in cache."""
    down_weight, bias = adapter.down_weight.to(x.dtype), adapter.down_bias
    bias = None if bias is None else bias.to(x.dtype)
    t = x.new_empty(x.shape[0], down_weight.shape[0])
    for rows in row_blocks(x):
        u = F.layer_norm(x[rows], x.shape[1:], norm.norm_weight, norm.norm_bias, LAYER_NORM_EPS)
        t[rows] = linear(u, down_weight, bias)
    return t


def adapter_backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    sequential: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if norm.layer_norm != "none":
        return NotImplemented
    down_weight, up_weight = adapter.down_weight, adapter.up_weight
    grads = [absent(dy) for _ in range(7)]
    if _covered(dy, x, down_weight.shape[0], transform.seed):
        found = _backward_in_one_pass(dy, x, t, adapter, transform, sequential, needs)
        return *found, *grads[5:]
    need_dt = needs[0] or needs[1] or needs[2]
    dt, *found = bottleneck_gradients(
        dy, t, up_weight, transform, need_dt=need_dt, need_db=needs[3], need_bias=needs[4]
    )
    fill(grads, [3, 4], found)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[0] or needs[1]:
        found = down_gradients(
            dt, x, down_weight, dy if sequential else None, need_dx=needs[0], need_da=needs[1]
        )
        fill(grads, [0, 1], found)
    return tuple(grads)


def _in_one_pass(x: Tensor, residual: Tensor, rank: int, seed: Tensor | None) -> bool:
    """Whether one pass is the fastest. Products in 16-bit arithmetic are faster in the library."""
    return not gemm.in_16_bits(x.dtype, x.device.type) and _covered(x, residual, rank, seed)


def _covered(dy: Tensor, x: Tensor, rank: int, seed: Tensor | None) -> bool:
    """Whether the one pass takes dy (M, N), x (M, K) and a rank, and the library is not faster."""
    slower = library_is_faster(x.dtype, rank, seed is not None)
    return not slower and covers(dy, rank) and covers(x, rank)


def _forward_in_one_pass(
    x: Tensor, residual: Tensor, adapter: Bottleneck, transform: Transform, keep_t: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    t = x.new_empty(x.shape[0], adapter.down_weight.shape[0]) if keep_t else None
    cpp.adapter_(
        y, t, x, residual, *map(cpp_weight, adapter), transform.scale,
        ACTIVATIONS.index(transform.activation), *cpp_mask(transform.dropout_p, transform.seed),
    )  # fmt: skip
    return y, t if keep_t else absent(x)


def _backward_in_one_pass(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    adapter: Bottleneck,
    transform: Transform,
    sequential: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The gradients of x, down_weight, down_bias, up_weight and up_bias; a gradient that
    is not needed is empty."""
    down_weight, up_weight = adapter.down_weight, adapter.up_weight
    like = (down_weight, down_weight[:, 0], up_weight, up_weight[:, 0])
    dx = x.new_empty(x.shape) if needs[0] else None
    found = [
        torch.empty(weight.shape, dtype=torch.float32) if needed else None
        for weight, needed in zip(like, needs[1:5], strict=True)
    ]
    cpp.adapter_backward_(
        dy, x, t, cpp_weight(down_weight), cpp_weight(up_weight),
        dy if sequential and needs[0] else None, dx, *found, transform.scale,
        ACTIVATIONS.index(transform.activation), *cpp_mask(transform.dropout_p, transform.seed),
    )  # fmt: skip
    nothing = absent(dy)
    grads = (None if d is None else d.to(weight.dtype) for d, weight in zip(found, like))
    return tuple(nothing if grad is None else grad for grad in (dx, *grads))
