"""Low-rank updates of many methods in one batch on the library's GEMMs, a part at a time.

Shapes and maths are those of ``reference``. A part is a block of rows of one method that stays in
cache, with its mask.
Traffic  P = one read or write of an M x K (or M x N) activation, whatever the number of methods.
         forward   x for T; base read, y written twice (the copy of base, the sum):       4 P
         backward  dy for dT and dU, x for dD; base read, dx written twice:               5 P
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common import gradients, passes
from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
    absent,
)
from pelt_fast.ops.common.dropout import MIN_ROWS, block_elements, drop_factor
from pelt_fast.ops.common.parts import Part, accumulator, drop_of, parts_of, widest


def down_forward(x: Tensor, down: RoutedDown, where: Segments, drop: RoutedDropout) -> Tensor:
    t = x.new_empty(x.shape[0], widest(where.ranks))
    weights, biases = down.down_weights.to(x.dtype), _cast(down.down_biases, x)
    for part in _parts(where, x):
        read, to = _dropped(x[part.rows], part, drop), t[part.rows, : part.rank]
        to.copy_(passes.linear(read, weights[part.ranks], _slice(biases, part.ranks)))
    return t


def down_backward(
    dt: Tensor,
    x: Tensor,
    base: Tensor | None,
    down_weights: Tensor,
    where: Segments,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    (total, width), wide = down_weights.shape, down_weights.dtype
    low, grads = down_weights.to(dt.dtype), [absent(dt) for _ in range(3)]
    if needs[0]:
        grads[0] = dt.new_zeros(dt.shape[0], width) if base is None else base.clone()
    if needs[1]:
        grads[1] = accumulator((total, width), dt, wide)
    if needs[2]:
        grads[2] = accumulator((total,), dt, wide)
    for part in _parts(where, x if needs[1] else dt, width):
        own, factor = dt[part.rows, : part.rank], _factor(part, width, dt, drop)
        if needs[0]:
            update = own @ low[part.ranks]
            grads[0][part.rows] += update if factor is None else update.mul_(factor)
        if needs[1]:
            read = x[part.rows] if factor is None else factor.mul_(x[part.rows])
            _add_outer(grads[1][part.ranks], own, read)
        if needs[2]:
            grads[2][part.ranks] += own.sum(0, dtype=grads[2].dtype)
    return grads[0], grads[1].to(wide), grads[2].to(wide)


def up_forward(
    base: Tensor,
    t: Tensor,
    up: RoutedUp,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
) -> Tensor:
    out = base.clone(memory_format=torch.contiguous_format)
    weights, biases = up.up_weights.to(base.dtype), _cast(up.up_biases, base)
    for part in _parts(where, base):
        scale, to = transform.scales[part.method], out[part.rows]
        if biases is not None:
            to.add_(biases[part.method], alpha=scale)
        h = _hidden(t, part, transform.activation, drop)
        to.addmm_(h, part.up(weights, base.shape[1]).t(), alpha=scale)
    return out


def up_backward(
    dy: Tensor,
    t: Tensor,
    up_weights: Tensor,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    outputs, wide, name = dy.shape[1], up_weights.dtype, transform.activation
    low, grads = up_weights.to(dy.dtype), [absent(dy) for _ in range(3)]
    if needs[0]:
        grads[0] = dy.new_empty(dy.shape[0], widest(where.ranks))
    if needs[1]:
        grads[1] = accumulator(up_weights.shape, dy, wide)
    if needs[2]:
        grads[2] = accumulator((len(where.ranks), outputs), dy, wide)
    for part in _parts(where, dy):
        scale, above = transform.scales[part.method], dy[part.rows]
        if needs[0]:
            dh = torch.mm(above, part.up(low, outputs)).mul_(scale)
            factor, own = _factor(part, part.rank, dy, drop), t[part.rows, : part.rank]
            dh = dh if factor is None else dh.mul_(factor)
            grads[0][part.rows, : part.rank] = gradients.activation_backward(
                name, dh, own.contiguous()
            )
        if needs[1]:
            h = _hidden(t, part, name, drop)
            _add_outer(part.up(grads[1], outputs), above, h, scale)
        if needs[2]:
            grads[2][part.method].add_(above.sum(0, dtype=grads[2].dtype), alpha=scale)
    return grads[0], grads[1].to(wide), grads[2].to(wide)


def _parts(where: Segments, x: Tensor, width: int | None = None) -> Iterator[Part]:
    """The parts of the segments, so small that a part of ``x`` and its mask stay in cache."""
    width = x.shape[1] if width is None else width
    return parts_of(where, max(MIN_ROWS, block_elements(x.device) // max(width, 1)))


def _cast(bias: Tensor | None, like: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(like.dtype)


def _slice(bias: Tensor | None, ranks: slice) -> Tensor | None:
    return None if bias is None else bias[ranks]


def _factor(part: Part, width: int, like: Tensor, drop: RoutedDropout) -> Tensor | None:
    """0 or 1 / (1 - p) for each element of a part ``width`` wide; None if nothing is dropped."""
    p, seed = drop_of(drop, part.method)
    if seed is None:
        return None
    rows = slice(part.own, part.own + part.rows.stop - part.rows.start)
    return drop_factor(rows, width, p, seed, like.dtype)


def _dropped(x: Tensor, part: Part, drop: RoutedDropout) -> Tensor:
    factor = _factor(part, x.shape[1], x, drop)
    return x if factor is None else factor.mul_(x)


def _hidden(t: Tensor, part: Part, name: str, drop: RoutedDropout) -> Tensor:
    """H of a part: drop'(f(T))."""
    h = passes.activate(name, t[part.rows, : part.rank].contiguous())
    return _dropped(h, part, drop)


def _add_outer(to: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """to += scale leftᵀ right, in the dtype of ``to``."""
    to.addmm_(left.to(to.dtype).t(), right.to(to.dtype), alpha=scale)
