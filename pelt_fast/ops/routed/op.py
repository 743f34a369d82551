"""The routed ops: schemas, fakes, autograd's Functions, and their order."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pelt_fast.ops.common.backends import active
from pelt_fast.ops.common.bundles import (
    NOTHING,
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
    absent,
    unflatten,
)
from pelt_fast.ops.common.library import Op, OpFunction, fake_gradients, keep_needed, run
from pelt_fast.ops.common.parts import parts_of, widest

from . import cpu, reference

GPU = "pelt_fast.ops.routed.gpu"
Layer = Callable[[Tensor], Tensor]


def _down_fake(x, down: RoutedDown, where: Segments, drop: RoutedDropout):
    return x.new_empty(x.shape[0], widest(where.ranks))


def _down_backward_fake(
    dt, x, base, down_weights, where: Segments, drop: RoutedDropout, needs: Sequence[bool]
):
    (total, width), wide = down_weights.shape, down_weights.dtype
    shapes = (((dt.shape[0], width), dt.dtype), ((total, width), wide), ((total,), wide))
    return fake_gradients(dt, shapes, needs)


def _up_fake(
    base, t, up: RoutedUp, where: Segments, transform: RoutedTransform, drop: RoutedDropout
):
    return base.new_empty(base.shape)


def _up_backward_fake(
    dy, t, up_weights, where: Segments, transform: RoutedTransform, drop: RoutedDropout,
    needs: Sequence[bool],
):  # fmt: skip
    rows, outputs = dy.shape
    wide, ranks = up_weights.dtype, where.ranks
    shapes = (
        ((rows, widest(ranks)), dy.dtype), (up_weights.shape, wide), ((len(ranks), outputs), wide),
    )  # fmt: skip
    return fake_gradients(dy, shapes, needs)


down_fwd = Op("routed_down_fwd", reference.down_forward, _down_fake)
down_bwd = Op("routed_down_bwd", reference.down_backward, _down_backward_fake)
up_fwd = Op("routed_up_fwd", reference.up_forward, _up_fake)
up_bwd = Op("routed_up_bwd", reference.up_backward, _up_backward_fake)
_EACH = (
    (down_fwd, "down_forward"), (down_bwd, "down_backward"), (up_fwd, "up_forward"),
    (up_bwd, "up_backward"),
)  # fmt: skip
for _op, _name in _EACH:
    _op.on_cpu(getattr(cpu, _name))
    _op.on_gpu(f"{GPU}:{_name}", "routed", size=None)

_down_arguments = unflatten(Tensor, RoutedDown, Segments, RoutedDropout)
_up_arguments = unflatten(Tensor, Tensor, RoutedUp, Segments, RoutedTransform, RoutedDropout)


class RoutedDownFunction(OpFunction):
    """(x, T): x itself, for the layer, and T[r, :R_g] = drop_g(x[r]) D_gᵀ + d_g.

    The layer reads the first result. So its gradient of x comes here, and the update's part is
    added to it: no second tensor of x's size is summed. Saves x if the D_g need a gradient.
    """

    @staticmethod
    def forward(ctx, *args):
        x, down, where, drop = _down_arguments(*args)
        backend = active.name
        t = down_fwd(*args, backend=backend)
        _, needs, _, _ = _down_arguments(*ctx.needs_input_grad)
        kept = x if needs.down_weights else None
        ctx.save_for_backward(kept, down.down_weights, where.segments, drop.seeds)
        ctx.settings = (where.ranks, drop.probabilities, backend)
        ctx.set_materialize_grads(False)
        return x, t

    @staticmethod
    @once_differentiable
    def backward(ctx, base, dt):
        x, down_weights, segments, seeds = ctx.saved_tensors
        ranks, probabilities, backend = ctx.settings
        need_x, needs, _, _ = _down_arguments(*ctx.needs_input_grad)
        nothing = (*NOTHING[Segments], *NOTHING[RoutedDropout])
        if dt is None:
            return base, None, None, *nothing
        needs = [need_x, *needs]
        grads = down_bwd(
            dt.contiguous(), absent(dt) if x is None else x,
            base.contiguous() if need_x and base is not None else None, down_weights, segments,
            ranks, probabilities, seeds, needs, backend=backend,
        )  # fmt: skip
        return *keep_needed(grads, needs), *nothing

    @staticmethod
    def infer(*args):
        return args[0], down_fwd(*args, backend=active.name)


class RoutedUpFunction(OpFunction):
    """y[r] = base[r] + s_g (drop'_g(f(T[r, :R_g])) U_gᵀ + u_g); base[r] for a row of none.

    Saves T (M, R_max), if the U_g need a gradient or f is not the identity.
    """

    @staticmethod
    def forward(ctx, *args):
        _, t, up, where, transform, drop = _up_arguments(*args)
        backend = active.name
        y = up_fwd(*args, backend=backend)
        _, need_t, needs, _, _, _ = _up_arguments(*ctx.needs_input_grad)
        keeps_t = needs.up_weights or (need_t and transform.activation != "identity")
        ctx.save_for_backward(t if keeps_t else None, up.up_weights, where.segments, drop.seeds)
        ctx.settings = (where.ranks, transform, drop.probabilities, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        t, up_weights, segments, seeds = ctx.saved_tensors
        ranks, transform, probabilities, backend = ctx.settings
        need_base, need_t, needs, _, _, _ = _up_arguments(*ctx.needs_input_grad)
        needs = [need_t, *needs]
        if t is None:  # of T's shape, with the storage of one row
            t = dy.new_empty(widest(ranks)).expand(dy.shape[0], -1)
        grads = up_bwd(
            dy.contiguous(), t, up_weights, segments, ranks, *transform, probabilities, seeds,
            needs, backend=backend,
        )  # fmt: skip
        dt, *small = keep_needed(grads, needs)
        watched = not torch.compiler.is_compiling() and torch.is_anomaly_enabled()
        if dt is not None and watched:  # anomaly detection looks for NaN in the whole of dT
            dt = _only_written(dt, Segments(segments, ranks))
        nothing = (*NOTHING[Segments], *NOTHING[RoutedTransform], *NOTHING[RoutedDropout])
        return dy if need_base else None, dt, *small, *nothing

    @staticmethod
    def infer(*args):
        return up_fwd(*args, backend=active.name)


def _only_written(t: Tensor, where: Segments) -> Tensor:
    """T or its gradient with zeros where nothing was written."""
    found = torch.zeros_like(t)
    for part in parts_of(where):
        found[part.rows, : part.rank] = t[part.rows, : part.rank]
    return found


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _down(
    x: Tensor, down: RoutedDown, where: Segments, drop: RoutedDropout
) -> tuple[Tensor, Tensor]:
    """x as the frozen layer must read it, and T (M, R_max), in the narrower dtype of x and D."""
    arguments, low = (*down, *where, *drop), down.down_weights.dtype
    if low.itemsize < x.dtype.itemsize:
        return x, run(RoutedDownFunction, _flat(x).to(low), *arguments)[1]
    through, t = run(RoutedDownFunction, _flat(x), *arguments)
    # without a gradient of x the layer has nothing to differentiate
    return (through.view(x.shape) if x.requires_grad else x), t


def routed_update(
    x: Tensor,
    layer: Layer | Tensor,
    down: RoutedDown,
    up: RoutedUp,
    where: Segments,
    transform: RoutedTransform,
    input_drop: RoutedDropout,
    hidden_drop: RoutedDropout,
) -> Tensor:
    """The updates of all methods around ``layer`` on x (..., K), in the dtype of the layer's
    output. ``layer`` may be that output (..., N) itself. The arguments were checked, the seeds
    drawn; x has M rows."""
    through, t = _down(x, down, where, input_drop)
    base = layer if isinstance(layer, Tensor) else layer(through)
    arguments = (*up, *where, *transform, *hidden_drop)
    return run(RoutedUpFunction, _flat(base), t.to(base.dtype), *arguments).view(base.shape)
