"""Passes over a batch of many methods by the library's GEMMs, a part of one method at a time.

A part is a block of rows that stays in cache, with its mask. Each function works on the rows of the
parts that it is given, in tensors that the caller has made: T is written, all else is added to.
"""

from collections.abc import Iterable

from torch import Tensor

from . import gradients, passes
from .bundles import RoutedDown, RoutedDropout, RoutedTransform, RoutedUp
from .dropout import drop_factor
from .parts import Part, drop_of


def down_(
    t: Tensor, x: Tensor, down: RoutedDown, parts: Iterable[Part], drop: RoutedDropout
) -> None:
    """t = drop_g(x) D_gᵀ + d_g."""
    low = x.dtype
    for part in parts:
        bias = None if down.down_biases is None else down.down_biases[part.ranks].to(low)
        read = _dropped(x[part.rows], part, drop)
        product = passes.linear(read, down.down_weights[part.ranks].to(low), bias)
        t[part.rows, : part.rank] = product


def down_backward_(
    dt: Tensor,
    x: Tensor,
    down_weights: Tensor,
    parts: Iterable[Part],
    drop: RoutedDropout,
    found: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """dx += drop_g(dT D_g); dD_g += dTᵀ drop_g(x); dd_g += Σ dT. ``found``: the three, None for one
    that is not requested."""
    dx, d_weights, d_biases = found
    for part in parts:
        own = dt[part.rows, : part.rank]
        factor = _factor(part, down_weights.shape[1], dt, drop)
        if dx is not None:
            update = gradients.product(own, down_weights[part.ranks].to(dt.dtype))
            dx[part.rows] += update if factor is None else update.mul_(factor)
        if d_weights is not None:
            read = x[part.rows] if factor is None else factor.mul_(x[part.rows])
            _add_outer(d_weights[part.ranks], own, read)
        if d_biases is not None:
            d_biases[part.ranks] += own.sum(0, dtype=d_biases.dtype)


def up_(
    y: Tensor,
    t: Tensor,
    up: RoutedUp,
    parts: Iterable[Part],
    transform: RoutedTransform,
    drop: RoutedDropout,
) -> None:
    """y += s_g (drop'_g(f(T)) U_gᵀ + u_g)."""
    low, outputs = y.dtype, y.shape[1]
    for part in parts:
        scale, to = transform.scales[part.method], y[part.rows]
        if up.up_biases is not None:
            to.add_(up.up_biases[part.method].to(low), alpha=scale)
        h = _hidden(t, part, transform.activation, drop)
        passes.add_product(to, h, part.up(up.up_weights, outputs).to(low).t(), scale, to)


def up_backward_(
    dy: Tensor,
    t: Tensor,
    up_weights: Tensor,
    parts: Iterable[Part],
    transform: RoutedTransform,
    drop: RoutedDropout,
    found: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """dT = s_g drop'_g(dy U_g) f'(T); dU_g += s_g dyᵀ H; du_g += s_g Σ dy. ``found``: the three,
    None for one that is not requested."""
    outputs, name, (dt, d_weights, d_biases) = dy.shape[1], transform.activation, found
    for part in parts:
        scale, above = transform.scales[part.method], dy[part.rows]
        if dt is not None:
            dh = gradients.product(above, part.up(up_weights, outputs).to(dy.dtype)).mul_(scale)
            factor, own = _factor(part, part.rank, dy, drop), t[part.rows, : part.rank]
            dh = dh if factor is None else dh.mul_(factor)
            dh = gradients.activation_backward(name, dh, own.contiguous())
            dt[part.rows, : part.rank] = dh
        if d_weights is not None:
            h = _hidden(t, part, name, drop)
            _add_outer(part.up(d_weights, outputs), above, h, scale)
        if d_biases is not None:
            d_biases[part.method].add_(above.sum(0, dtype=d_biases.dtype), alpha=scale)


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
