"""The widened block's ops: schemas, fakes and autograd's Function."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.autograd.function import once_differentiable

from pelt_fast.ops.common.backends import active
from pelt_fast.ops.common.bundles import (
    NOTHING,
    Bottleneck,
    FFNMatrices,
    FFNSettings,
    FrozenFFN,
    Packed,
    absent,
    unflatten,
)
from pelt_fast.ops.common.dropout import draw_seeds
from pelt_fast.ops.common.library import Op, OpFunction, fake_gradients, keep_needed, run
from pelt_fast.ops.common.passes import has_few_rows

from . import cpu, reference

GPU = "pelt_fast.ops.widened_ffn.gpu"


def _forward_fake(x, adapter_x, ffn: FrozenFFN, adapter, packed: Packed, settings, keep_pre: bool):
    blocks = 1 if ffn.gate_weight is None else 2
    width = ffn.in_weight.shape[0] * blocks + adapter.down_weight.shape[0]
    width = width if packed.packed is None else packed.packed.shape[0]
    pre = x.new_empty(x.shape[0], width) if keep_pre else absent(x)
    return x.new_empty(x.shape[0], ffn.out_weight.shape[0]), pre


def _backward_fake(
    dy, x, pre, weights: FFNMatrices, packed, settings, separate, needs: Sequence[bool]
):
    down, up, rows = weights.down_weight, weights.up_weight, dy.shape[0]
    shapes = (
        ((rows, weights.in_weight.shape[1]), dy.dtype), (down.shape, down.dtype),
        ((down.shape[0],), down.dtype), (up.shape, up.dtype), ((up.shape[0],), up.dtype),
        ((rows, down.shape[1]), dy.dtype),
    )  # fmt: skip
    return fake_gradients(dy, shapes, needs)


ffn_fwd = Op("ffn_fwd", reference.ffn_forward, _forward_fake)
ffn_bwd = Op("ffn_bwd", reference.ffn_backward, _backward_fake)
ffn_fwd.on_cpu(cpu.ffn_forward)
ffn_bwd.on_cpu(cpu.ffn_backward)
_READ_BY_GEMMS = ("in_weight", "gate_weight", "out_weight", "packed_out")
for _op, _name in ((ffn_fwd, "ffn_forward"), (ffn_bwd, "ffn_backward")):
    _op.on_gpu(f"{GPU}:{_name}", "ffn", size=("down_weight", 0), any_strides=_READ_BY_GEMMS)


class Buffers(Protocol):
    """Buffers of a site that hold the frozen weights (:class:`pelt_fast.modules.packing.Packings`).
    Each call that reads them fills them first, and holds their lock meanwhile."""

    lock: contextlib.AbstractContextManager
    fills: int

    def filled(self, weights: FFNMatrices, scale: float, fills: int = -1) -> Packed:
        """The stacked weights with those of this call. Nothing is copied if the number of fills is
        still ``fills``, the number after the forward of this call."""


class Stacked(NamedTuple):
    """The stacked weights of a call: made by the caller, or stored in buffers of its site."""

    packed: Tensor | None = None
    packed_out: Tensor | None = None
    buffers: Buffers | None = None


ffn_step = cpu.ffn_step

_arguments = unflatten(Tensor, Tensor, FrozenFFN, Bottleneck, Stacked, FFNSettings)


def _forward(args: tuple, keep_pre: bool) -> tuple[Tensor, Tensor, FFNMatrices, int]:
    """y and pre from the Function's arguments, the matrices in these, and the number of fills of
    the buffers."""
    x, adapter_x, ffn, adapter, stacked, settings = _arguments(*args)
    down, up, buffers = adapter.down_weight, adapter.up_weight, stacked.buffers
    weights = FFNMatrices(ffn.in_weight, ffn.gate_weight, ffn.out_weight, down, up)
    with buffers.lock if buffers else contextlib.nullcontext():
        packed = buffers.filled(weights, settings.scale) if buffers else stacked[:2]
        fills = buffers.fills if buffers else 0
        y, pre = ffn_fwd(
            x, adapter_x, *ffn, *adapter, *packed, *settings, keep_pre, backend=active.name
        )
    return y, pre, weights, fills


class WidenedFFNFunction(OpFunction):
    """A frozen block with a parallel adapter, one function of x (M, K).

    Saves the adapter's input, x or adapter_x, and the pre-activations (M, F + R); of these only
    T (M, R) if dx is not needed. Other calls write the buffers of a site, too. Backward then fills
    them again, with the weights that forward saved.
    """

    @staticmethod
    def forward(ctx, *args):
        y, pre, weights, ctx.fills = _forward(args, True)
        x, adapter_x, ffn, adapter, stacked, settings = _arguments(*args)
        need_x, _, _, needs, _, _ = _arguments(*ctx.needs_input_grad)
        if not need_x:
            rank, blocks = adapter.down_weight.shape[0], 1 if ffn.gate_weight is None else 2
            first = ffn.in_weight.shape[0] * blocks
            pre = pre[:, first : first + rank].contiguous()
        read = x if adapter_x is None else adapter_x
        ctx.save_for_backward(
            read if needs.down_weight else None, pre, *weights, stacked.packed,
            stacked.packed_out, settings.seed,
        )  # fmt: skip
        ctx.settings, ctx.backend = settings[:-1], active.name
        ctx.separate = adapter_x is not None
        # only dx reads the frozen weights
        ctx.buffers = stacked.buffers if need_x else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, pre, *weights, packed, packed_out, seed = ctx.saved_tensors
        buffers, packed = ctx.buffers, Packed(packed, packed_out)
        settings, weights = FFNSettings(*ctx.settings, seed), FFNMatrices(*weights)
        need_x, need_adapter_x, _, adapter_needs, _, _ = _arguments(*ctx.needs_input_grad)
        needs = [need_x, *adapter_needs, need_adapter_x]
        with buffers.lock if buffers else contextlib.nullcontext():
            if buffers:
                packed = buffers.filled(weights, settings.scale, ctx.fills)
            grads = ffn_bwd(
                dy.contiguous(), absent(dy) if x is None else x, pre, *weights, *packed, *settings,
                ctx.separate, needs, backend=ctx.backend,
            )  # fmt: skip
        dx, *small, d_adapter_x = keep_needed(grads, needs)
        nothing = (*NOTHING[Packed], None, *NOTHING[FFNSettings])
        return dx, d_adapter_x, *NOTHING[FrozenFFN], *small, *nothing

    @staticmethod
    def infer(*args):
        return _forward(args, False)[0]


def widened_ffn(
    x: Tensor,
    adapter_x: Tensor | None,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    stacked: Stacked,
    settings: FFNSettings,
    training: bool,
) -> Tensor:
    """The widened block on x (..., K). The arguments were checked; the seed of ``settings`` is
    drawn here."""
    seed = draw_seeds(x, training, *settings[3:6])
    if seed is None:
        settings = FFNSettings(*settings[:3], 0.0, 0.0, 0.0, None)
    else:
        settings = settings._replace(seed=seed)
    shape = (*x.shape[:-1], ffn.out_weight.shape[0])
    x = x.reshape(-1, x.shape[-1])
    adapter_x = None if adapter_x is None else adapter_x.reshape(-1, adapter_x.shape[-1])
    if stacked.buffers is not None and seed is None and has_few_rows(x):
        stacked = Stacked()  # filling the buffers would cost more than the two small products
    y = run(WidenedFFNFunction, x, adapter_x, *ffn, *adapter, *stacked, *settings)
    return y.view(shape)
