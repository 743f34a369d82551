"""Low-rank updates of many methods in one batch on the C++ passes, or the library's GEMMs.

Shapes and maths are those of ``reference``.
Traffic  P = one read or write of an M x K (or M x N) activation, whatever the number of methods.
         forward   x for T, base read, y written:                                3 P
         backward  dy for dT, dU and du, x for dD, base read and dx written:     4 P
         The factors of the methods that have rows are read once each way, their gradients written.
The library's GEMMs run for methods of a rank above ``passes.MAX_RANK``, and for all where the C++
ops do not take the tensors. base and dx are then read and written once more.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common import grouped, passes
from pelt_fast.ops.common.activations import ACTIVATIONS
from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
    absent,
)
from pelt_fast.ops.common.dropout import MIN_ROWS, block_elements, keep_scale, threshold
from pelt_fast.ops.common.parts import Part, accumulator, parts_of, widest


def down_forward(x: Tensor, down: RoutedDown, where: Segments, drop: RoutedDropout) -> Tensor:
    t, ours = x.new_empty(x.shape[0], widest(where.ranks)), _takes(x)
    if ours:
        passes.cpp.routed_down_(t, x, *map(_factor, down), *_place(where), *_masks(drop))
    grouped.down_(t, x, down, _left(where, x, x.shape[1], ours), drop)
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
    need_x, need_weights, need_biases = needs
    (total, width), wide, rows = down_weights.shape, down_weights.dtype, dt.shape[0]
    read = x if need_weights else None
    ours = _takes(dt, read, base)
    d_weights, d_biases = _sums((total, width), (total,), dt, wide, ours)
    dx = None
    if need_x and ours:
        dx = dt.new_empty(rows, width)
    elif need_x:
        dx = dt.new_zeros(rows, width) if base is None else base.clone()
    found = (dx, d_weights if need_weights else None, d_biases if need_biases else None)
    if ours:
        passes.cpp.routed_down_backward_(
            dt, read, base if need_x else None, _factor(down_weights), *found, *_place(where),
            *_masks(drop),
        )  # fmt: skip
    grouped.down_backward_(dt, x, down_weights, _left(where, dt, width, ours), drop, found)
    return _finished(found, dt, wide)


def up_forward(
    base: Tensor,
    t: Tensor,
    up: RoutedUp,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
) -> Tensor:
    ours = _takes(base, t)
    if ours:
        y = torch.empty_like(base, memory_format=torch.contiguous_format)
        passes.cpp.routed_up_(
            y, base, t, *map(_factor, up), *_place(where), *_numbers(transform), *_masks(drop)
        )
    else:
        y = base.clone(memory_format=torch.contiguous_format)
    grouped.up_(y, t, up, _left(where, base, base.shape[1], ours), transform, drop)
    return y


def up_backward(
    dy: Tensor,
    t: Tensor,
    up_weights: Tensor,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    need_t, need_weights, need_biases = needs
    outputs, wide, ranks = dy.shape[1], up_weights.dtype, where.ranks
    read = t if need_weights or transform.activation != "identity" else None
    ours = _takes(dy, read)
    sums = _sums(up_weights.shape, (len(ranks), outputs), dy, wide, ours)
    dt = dy.new_empty(dy.shape[0], widest(ranks)) if need_t else None
    found = (dt, sums[0] if need_weights else None, sums[1] if need_biases else None)
    if ours:
        passes.cpp.routed_up_backward_(
            dy, read, _factor(up_weights), *found, *_place(where), *_numbers(transform),
            *_masks(drop),
        )  # fmt: skip
    grouped.up_backward_(dy, t, up_weights, _left(where, dy, outputs, ours), transform, drop, found)
    return _finished(found, dy, wide)


def _takes(*tensors: Tensor | None) -> bool:
    """Whether the C++ ops take these activations."""
    return all(t is None or passes.covers_rows(t) for t in tensors)


def _left(where: Segments, x: Tensor, width: int, ours: bool) -> Iterable[Part]:
    """What the C++ ops leave, in parts so small that ``width`` columns of one and their mask stay
    in cache."""
    if ours and widest(where.ranks) <= passes.MAX_RANK:
        return ()
    most_rows = max(MIN_ROWS, block_elements(x.device) // max(width, 1))
    parts = parts_of(where, most_rows)
    return (part for part in parts if part.rank > passes.MAX_RANK) if ours else parts


def _factor(weight: Tensor | None) -> Tensor | None:
    """Stacked factors in the form that the C++ code reads."""
    if weight is None:
        return None
    weight = weight.detach().contiguous()
    return weight.float() if weight.dtype not in passes.DTYPES else weight


def _place(where: Segments) -> tuple[Tensor, Sequence[int]]:
    return where.segments.contiguous(), where.ranks


def _numbers(transform: RoutedTransform) -> tuple[Sequence[float], int]:
    return transform.scales, ACTIVATIONS.index(transform.activation)


def _masks(drop: RoutedDropout) -> tuple[Tensor | None, list[int], list[float]]:
    """The arguments of the C++ code for the dropout masks."""
    if drop.seeds is None:
        return None, [], []
    return (
        drop.seeds.contiguous(), [threshold(p) for p in drop.probabilities],
        [keep_scale(p) for p in drop.probabilities],
    )  # fmt: skip


def _sums(
    weights: Sequence[int], biases: Sequence[int], like: Tensor, wide: torch.dtype, ours: bool
) -> tuple[Tensor, Tensor]:
    """Tensors for the gradients of the factors: the C++ code fills them, the library adds."""
    if ours:
        return tuple(like.new_empty(shape, dtype=torch.float32) for shape in (weights, biases))
    return tuple(accumulator(shape, like, wide) for shape in (weights, biases))


def _finished(
    found: tuple[Tensor | None, ...], like: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The results, the gradients of the factors in ``wide``; empty tensors for those missing."""
    first, *sums = (absent(like) if grad is None else grad for grad in found)
    return first, *(grad.to(wide) for grad in sums)
