"""Low-rank updates of many methods in one batch on the Triton kernels.

Shapes and maths are those of ``reference``. Nothing is read from the device, and no kernel is
compiled for the routes: the launches are the same for other routes.
Traffic  P = one read or write of an M x K (or M x N) activation, whatever the number of methods.
         forward   x for T, base read, y written:                            3 P
         backward  dy for dT, dU and du, x for dD, base read, dx written:    4 P
Above rank ``MAX_RANK`` the library's GEMMs run, a segment at a time.
"""

from collections.abc import Sequence

from torch import Tensor

from pelt_fast.kernels.routed import routed_rows
from pelt_fast.kernels.routed_down import routed_bias, routed_down, routed_down_bwd
from pelt_fast.kernels.routed_up import routed_input_gradient, routed_up, routed_up_bwd
from pelt_fast.kernels.tiles import MAX_RANK
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
    absent,
)
from pelt_fast.ops.common.parts import widest


def down_forward(x: Tensor, down: RoutedDown, where: Segments, drop: RoutedDropout) -> Tensor:
    if _left(x, where):
        return NotImplemented
    return routed_down(x, down, routed_rows(where, x.shape[0]), drop)


def down_backward(
    dt: Tensor,
    x: Tensor,
    base: Tensor | None,
    down_weights: Tensor,
    where: Segments,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if _left(dt, where):
        return NotImplemented
    rows, grads = routed_rows(where, dt.shape[0]), [absent(dt) for _ in range(3)]
    if needs[0]:
        grads[0] = routed_input_gradient(dt, base, down_weights, rows, drop)
    if needs[1]:
        grads[1] = routed_down_bwd(dt, x, down_weights.dtype, rows, drop)
    if needs[2]:
        grads[2] = routed_bias(dt, down_weights.dtype, rows)
    return tuple(grads)


def up_forward(
    base: Tensor,
    t: Tensor,
    up: RoutedUp,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
) -> Tensor:
    if _left(base, where):
        return NotImplemented
    return routed_up(base, t, up, routed_rows(where, base.shape[0]), transform, drop)


def up_backward(
    dy: Tensor,
    t: Tensor,
    up_weights: Tensor,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if _left(dy, where):
        return NotImplemented
    rows = routed_rows(where, dy.shape[0])
    found = routed_up_bwd(dy, t, up_weights, rows, transform, drop, needs)
    return tuple(absent(dy) if grad is None else grad for grad in found)


def _left(x: Tensor, where: Segments) -> bool:
    """Whether the kernels leave this to the library: nothing to do, or a rank too large."""
    rank = widest(where.ranks)
    if rank > MAX_RANK:
        dispatch.fall_back(
            "routed: running on library kernels, because the kernels take a rank of 1 to"
            f" {MAX_RANK}, got {rank}"
        )
    return rank > MAX_RANK or rank == 0 or x.numel() == 0
