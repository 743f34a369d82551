"""The specification of low-rank updates of many methods in one batch, in plain PyTorch.

Each row of the batch runs under its own method g, or under none. The update is in two halves around
the layer, as in ``ops/beside``: a loop over the segments, each of which is rows of one method.

Shapes   x (M, K); D_g (R_g, K), d_g (R_g); T (M, R_max); base (M, N); U_g (N, R_g), u_g (N).
Maths    T[r, :R_g] = drop_g(x[r]) D_gᵀ + d_g;  H = drop'_g(f(T))       for a row r of method g
         y[r] = base[r] + s_g (H[r] U_gᵀ + u_g);  y[r] = base[r] for a row of none
         LoRA: f is the identity, without biases; its one dropout is drop. An adapter: drop'.
         A mask is the one that the method draws alone for its own rows, one behind the other.
Saved    x and T. Nothing of size M x N.

Of T and its gradient only [r, :R_g] of routed rows is written and read; the rest is uninitialised.
Activations may be of lower precision than the factors. The factors are then cast, and their
gradients are accumulated in their own dtype. Gradients that ``needs`` does not request are empty
tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common.activations import activate, derivative
from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
    absent,
)
from pelt_fast.ops.common.dropout import dropout
from pelt_fast.ops.common.parts import Part, accumulator, drop_of, parts_of, widest
from pelt_fast.ops.common.products import outer


def _dropped(x: Tensor, part: Part, drop: RoutedDropout) -> Tensor:
    """The dropout of a part's rows, with the mask of the method's own rows."""
    return dropout(x, *drop_of(drop, part.method), part.own * x.shape[1])


def down_forward(x: Tensor, down: RoutedDown, where: Segments, drop: RoutedDropout) -> Tensor:
    """Return T (M, R_max)."""
    t = x.new_empty(x.shape[0], widest(where.ranks))
    for part in parts_of(where):
        weight = down.down_weights[part.ranks].to(x.dtype)
        bias = None if down.down_biases is None else down.down_biases[part.ranks].to(x.dtype)
        t[part.rows, : part.rank] = F.linear(_dropped(x[part.rows], part, drop), weight, bias)
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
    """Return dx and the gradients of down_weights and down_biases; ``needs`` holds a flag for each.

    ``base`` is the gradient of x through the frozen layer, or None (zeros). Only dD reads ``x``.

    dx = base + drop_g(dT D_g), on a row of none base;  dD_g = dTᵀ drop_g(x);  dd_g = Σ dT.
    """
    (total, width), wide = down_weights.shape, down_weights.dtype
    dx = dt.new_zeros(dt.shape[0], width) if base is None else base.clone()
    d_weights, d_biases = accumulator((total, width), dt, wide), accumulator((total,), dt, wide)
    for part in parts_of(where):
        own = dt[part.rows, : part.rank]
        if needs[0]:
            dx[part.rows] += _dropped(own @ down_weights[part.ranks].to(dt.dtype), part, drop)
        if needs[1]:
            d_weights[part.ranks] += outer(own, _dropped(x[part.rows], part, drop), wide)
        if needs[2]:
            d_biases[part.ranks] += own.sum(0, dtype=wide)
    found = (dx, d_weights.to(wide), d_biases.to(wide))
    return tuple(g if need else absent(dt) for g, need in zip(found, needs, strict=True))


def up_forward(
    base: Tensor,
    t: Tensor,
    up: RoutedUp,
    where: Segments,
    transform: RoutedTransform,
    drop: RoutedDropout,
) -> Tensor:
    """Return y (M, N)."""
    y = base.clone(memory_format=torch.contiguous_format)
    for part in parts_of(where):
        weight = part.up(up.up_weights, base.shape[1]).to(base.dtype)
        bias = None if up.up_biases is None else up.up_biases[part.method].to(base.dtype)
        h = activate(transform.activation, t[part.rows, : part.rank])
        update = F.linear(_dropped(h, part, drop), weight, bias)
        y[part.rows] += transform.scales[part.method] * update
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
    """Return dT and the gradients of up_weights and up_biases; ``needs`` holds a flag for each. The
    gradient of base is dy itself.

    dT = s_g drop'_g(dy U_g) f'(T);  dU_g = s_g dyᵀ H;  du_g = s_g Σ dy.
    T is read for dU, and for dT if f is not the identity.
    """
    outputs, wide, name = dy.shape[1], up_weights.dtype, transform.activation
    dt = dy.new_empty(dy.shape[0], widest(where.ranks))
    d_weights = accumulator(up_weights.shape, dy, wide)
    d_biases = accumulator((len(where.ranks), outputs), dy, wide)
    for part in parts_of(where):
        scale, above, own = transform.scales[part.method], dy[part.rows], t[part.rows, : part.rank]
        if needs[0]:
            weight = part.up(up_weights, outputs).to(dy.dtype)
            found = _dropped(scale * (above @ weight), part, drop)
            dt[part.rows, : part.rank] = (
                found if name == "identity" else found * derivative(name, own)
            )
        if needs[1]:
            h = _dropped(activate(name, own), part, drop)
            part.up(d_weights, outputs).add_(scale * outer(above, h, wide))
        if needs[2]:
            d_biases[part.method] += scale * above.sum(0, dtype=wide)
    found = (dt, d_weights.to(wide), d_biases.to(wide))
    return tuple(g if need else absent(dy) for g, need in zip(found, needs, strict=True))
