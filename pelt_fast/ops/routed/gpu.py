"""Low-rank updates of many methods in one batch, on a GPU.

No kernel takes them yet: the library's GEMMs of ``cpu`` run, a segment at a time.
"""

from collections.abc import Sequence

from torch import Tensor

from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
)


def down_forward(x: Tensor, down: RoutedDown, where: Segments, drop: RoutedDropout) -> Tensor:
    return NotImplemented


def down_backward(
    dt: Tensor,
    x: Tensor,
    base: Tensor | None,
    down_weights: Tensor,
    where: Segments,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return NotImplemented


def up_forward(
    base: Tensor,
    t: Tensor,
    up: RoutedUp,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
) -> Tensor:
    return NotImplemented


def up_backward(
    dy: Tensor,
    t: Tensor,
    up_weights: Tensor,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return NotImplemented
