"""The ops beside a frozen layer: schemas, fakes, autograd's Functions, and their order."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.autograd.function import once_differentiable

from pelt_fast.ops.common.backends import active
from pelt_fast.ops.common.bundles import (
    NOTHING,
    Bottleneck,
    Down,
    Dropout,
    FFNSettings,
    LowRank,
    Transform,
    Up,
    absent,
    unflatten,
)
from pelt_fast.ops.common.dropout import draw_seeds, ffn_dropouts, seed_row
from pelt_fast.ops.common.library import Op, OpFunction, fake_gradients, keep_needed, run

from . import cpu, reference

GPU = "pelt_fast.ops.beside.gpu"
Layer = Callable[[Tensor], Tensor]


def _down_fake(x, down: Down, drop: Dropout):
    return x.new_empty(x.shape[0], down.down_weight.shape[0])


def _down_backward_fake(dt, x, base, down_weight, drop: Dropout, needs: Sequence[bool]):
    (rank, width), wide = down_weight.shape, down_weight.dtype
    shapes = (((dt.shape[0], width), dt.dtype), ((rank, width), wide), ((rank,), wide))
    return fake_gradients(dt, shapes, needs)


def _up_fake(base, t, up: Up, transform: Transform, output_dropout_p, output_seed):
    return base.new_empty(base.shape)


def _up_backward_fake(
    dy, t, up_weight, transform: Transform, output_dropout_p, output_seed, needs: Sequence[bool]
):
    (outputs, rank), wide = up_weight.shape, up_weight.dtype
    shapes = (
        (dy.shape, dy.dtype), ((dy.shape[0], rank), dy.dtype), ((outputs, rank), wide),
        ((outputs,), wide),
    )  # fmt: skip
    return fake_gradients(dy, shapes, needs)


def _activation_fake(pre, gate, activation, drop: Dropout):
    return pre.new_empty(pre.shape)


def _activation_backward_fake(da, pre, gate, activation, drop: Dropout):
    return da.new_empty(da.shape), absent(da) if gate is None else da.new_empty(da.shape)


down_fwd = Op("beside_down_fwd", reference.down_forward, _down_fake)
down_bwd = Op("beside_down_bwd", reference.down_backward, _down_backward_fake)
up_fwd = Op("beside_up_fwd", reference.up_forward, _up_fake)
up_bwd = Op("beside_up_bwd", reference.up_backward, _up_backward_fake)
act_fwd = Op("beside_act_fwd", reference.activation_forward, _activation_fake)
act_bwd = Op("beside_act_bwd", reference.activation_backward, _activation_backward_fake)
_EACH = (
    (down_fwd, "down_forward", ("down_weight", 0)), (down_bwd, "down_backward", ("down_weight", 0)),
    (up_fwd, "up_forward", ("up_weight", 1)), (up_bwd, "up_backward", ("up_weight", 1)),
    (act_fwd, "activation_forward", None), (act_bwd, "activation_backward", None),
)  # fmt: skip
for _op, _name, _size in _EACH:
    _op.on_cpu(getattr(cpu, _name))
    _op.on_gpu(f"{GPU}:{_name}", "beside", size=_size)

_down_arguments = unflatten(Tensor, Down, Dropout)
_up_arguments = unflatten(Tensor, Tensor, Up, Transform, Dropout)
_activation_arguments = unflatten(Tensor, Tensor, str, Dropout)


class DownFunction(OpFunction):
    """(x, T): x itself, for the layer, and T = drop_x(x) Dᵀ + d.

    The layer reads the first result. So its gradient of x comes here, and the update's part is
    added to it: no second tensor of x's size is summed. Saves x if D needs a gradient.
    """

    @staticmethod
    def forward(ctx, *args):
        x, down, drop = _down_arguments(*args)
        backend = active.name
        t = down_fwd(*args, backend=backend)
        _, needs, _ = _down_arguments(*ctx.needs_input_grad)
        ctx.save_for_backward(x if needs.down_weight else None, down.down_weight, drop.seed)
        ctx.settings = (drop.dropout_p, backend)
        ctx.set_materialize_grads(False)
        return x, t

    @staticmethod
    @once_differentiable
    def backward(ctx, base, dt):
        x, down_weight, seed = ctx.saved_tensors
        dropout_p, backend = ctx.settings
        need_x, needs, _ = _down_arguments(*ctx.needs_input_grad)
        if dt is None:
            return base, None, None, *NOTHING[Dropout]
        needs = [need_x, *needs]
        grads = down_bwd(
            dt.contiguous(), absent(dt) if x is None else x,
            base.contiguous() if need_x and base is not None else None, down_weight, dropout_p,
            seed, needs, backend=backend,
        )  # fmt: skip
        return *keep_needed(grads, needs), *NOTHING[Dropout]

    @staticmethod
    def infer(*args):
        return args[0], down_fwd(*args, backend=active.name)


class UpFunction(OpFunction):
    """y = drop_o(base) + s (drop(f(T)) Uᵀ + u).

    Saves T (M, R), if U needs a gradient or f is not the identity.
    """

    @staticmethod
    def forward(ctx, *args):
        _, t, up, transform, output = _up_arguments(*args)
        backend = active.name
        y = up_fwd(*args, backend=backend)
        _, need_t, needs, _, _ = _up_arguments(*ctx.needs_input_grad)
        keeps_t = needs.up_weight or (need_t and transform.activation != "identity")
        ctx.save_for_backward(t if keeps_t else None, up.up_weight, transform.seed, output.seed)
        ctx.settings = (transform[:-1], output.dropout_p, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        t, up_weight, seed, output_seed = ctx.saved_tensors
        transform, output_p, backend = ctx.settings
        need_base, need_t, needs, _, _ = _up_arguments(*ctx.needs_input_grad)
        dropped = need_base and output_seed is not None  # else the gradient of base is dy itself
        needs = [dropped, need_t, *needs]
        if t is None:  # of T's shape, with the storage of one row
            t = dy.new_empty(up_weight.shape[1]).expand(dy.shape[0], -1)
        grads = up_bwd(
            dy.contiguous(), t, up_weight, *transform, seed, output_p, output_seed, needs,
            backend=backend,
        )  # fmt: skip
        d_base, *small = keep_needed(grads, needs)
        d_base = dy if need_base and not dropped else d_base
        return d_base, *small, *NOTHING[Transform], *NOTHING[Dropout]

    @staticmethod
    def infer(*args):
        return up_fwd(*args, backend=active.name)


class ActivationFunction(OpFunction):
    """A = drop_a(φ(Z)) or drop_a(φ(G) Z). Saves Z, and G."""

    @staticmethod
    def forward(ctx, *args):
        pre, gate, activation, drop = _activation_arguments(*args)
        ctx.backend = active.name
        ctx.save_for_backward(pre, gate, drop.seed)
        ctx.settings = (activation, drop.dropout_p)
        return act_fwd(*args, backend=ctx.backend)

    @staticmethod
    @once_differentiable
    def backward(ctx, da):
        *inputs, seed = ctx.saved_tensors
        grads = act_bwd(da.contiguous(), *inputs, *ctx.settings, seed, backend=ctx.backend)
        d_pre, d_gate = keep_needed(grads, ctx.needs_input_grad[:2])
        return d_pre, d_gate, None, *NOTHING[Dropout]

    @staticmethod
    def infer(*args):
        return act_fwd(*args, backend=active.name)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _down(x: Tensor, down: Down, drop: Dropout) -> tuple[Tensor, Tensor]:
    """x as the frozen layer must read it, and T (M, R), in the narrower dtype of x and D."""
    if down.down_weight.dtype.itemsize < x.dtype.itemsize:
        return x, run(DownFunction, _flat(x).to(down.down_weight.dtype), *down, *drop)[1]
    through, t = run(DownFunction, _flat(x), *down, *drop)
    # without a gradient of x the layer has nothing to differentiate
    return (through.view(x.shape) if x.requires_grad else x), t


def _up(base: Tensor, t: Tensor, up: Up, transform: Transform, output: Dropout) -> Tensor:
    """y, in the dtype of ``base``."""
    y = run(UpFunction, _flat(base), t.to(base.dtype), *up, *transform, *output)
    return y.view(base.shape)


def lora_beside(
    layer: Layer, x: Tensor, factors: LowRank, dropout_p: float, training: bool
) -> Tensor:
    """LoRA beside ``layer`` on x (..., K). The arguments were checked; the seed is drawn here."""
    seed = seed_row(draw_seeds(x, training, dropout_p), 0, dropout_p)
    through, t = _down(x, Down(factors.lora_a, None), Dropout(dropout_p, seed))
    transform = Transform("identity", factors.scale, 0.0, None)
    return _up(layer(through), t, Up(factors.lora_b, None), transform, Dropout(0.0, None))


class FrozenLayers(NamedTuple):
    """The projections of a feed-forward block, as functions of their input."""

    in_layer: Layer
    gate_layer: Layer | None
    out_layer: Layer


def ffn_beside(
    x: Tensor,
    adapter_x: Tensor | None,
    layers: FrozenLayers,
    adapter: Bottleneck,
    settings: FFNSettings,
    training: bool,
) -> Tensor:
    """The frozen block and its parallel adapter on x (..., K). The arguments were checked; the seed
    of ``settings`` is drawn here, as for the widened block: the masks are the same."""
    settings = settings._replace(seed=draw_seeds(x, training, *settings[3:6]))
    bottleneck_drop, inner_drop, output_drop = ffn_dropouts(settings)
    down, up = Down(*adapter[:2]), Up(*adapter[2:])
    through, t = _down(x if adapter_x is None else adapter_x, down, Dropout(0.0, None))
    x = through if adapter_x is None else x
    gate = None if layers.gate_layer is None else layers.gate_layer(x)
    pre = layers.in_layer(x)
    flat = _flat(pre), None if gate is None else _flat(gate)
    a = run(ActivationFunction, *flat, settings.ffn_activation, *inner_drop)
    base = layers.out_layer(a.view(pre.shape))
    transform = Transform(settings.activation, settings.scale, *bottleneck_drop)
    return _up(base, t, up, transform, output_drop)
