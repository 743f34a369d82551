"""Ops ``ffn_*``, the widened FFN: schemas, fakes, autograd Function."""

import contextlib

from torch.autograd.function import once_differentiable

from pelt_fast.plans import ffn as plans
from pelt_fast.reference import ffn as reference
from pelt_fast.reference.low_rank import empty_like_nothing

from .backends import active_backend
from .function import OpFunction
from .fused import fused_or_plan
from .library import Op
from .low_rank import keep_needed

PACKINGS, SCALE = 14, 2  # places among the Function's arguments, and among its settings


def _width(in_weight, gate_weight, down_weight, packed):
    """Columns of ``pre``."""
    if packed is not None:
        return packed.shape[0]
    return in_weight.shape[0] * (1 if gate_weight is None else 2) + down_weight.shape[0]


def _ffn_fwd_fake(
    x, adapter_x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias, down_weight,
    down_bias, up_weight, up_bias, packed, packed_out, ffn_activation, activation, scale, dropout_p,
    activation_dropout_p, output_dropout_p, seed, keep_pre,
):  # fmt: skip
    width = _width(in_weight, gate_weight, down_weight, packed)
    pre = x.new_empty(x.shape[0], width) if keep_pre else empty_like_nothing(x)
    return x.new_empty(x.shape[0], out_weight.shape[0]), pre


def _ffn_bwd_fake(
    dy, x, pre, in_weight, gate_weight, out_weight, down_weight, up_weight, packed, packed_out,
    ffn_activation, activation, scale, dropout_p, activation_dropout_p, output_dropout_p, seed,
    separate, needs,
):  # fmt: skip
    shapes = (
        (dy.shape[0], in_weight.shape[1]), down_weight.shape, (down_weight.shape[0],),
        up_weight.shape, (up_weight.shape[0],), (dy.shape[0], down_weight.shape[1]),
    )  # fmt: skip
    dtypes = (dy.dtype, *[down_weight.dtype] * 2, *[up_weight.dtype] * 2, dy.dtype)
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else empty_like_nothing(dy)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


ffn_fwd = Op(
    "ffn_fwd",
    "(Tensor x, Tensor? adapter_x, Tensor in_weight, Tensor? in_bias, Tensor? gate_weight,"
    " Tensor? gate_bias, Tensor out_weight, Tensor? out_bias, Tensor down_weight,"
    " Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? packed, Tensor? packed_out,"
    " str ffn_activation,"
    " str activation, float scale, float dropout_p, float activation_dropout_p,"
    " float output_dropout_p, Tensor? seed, bool keep_pre) -> (Tensor, Tensor)",
    reference.ffn_forward,
    _ffn_fwd_fake,
)
ffn_bwd = Op(
    "ffn_bwd",
    "(Tensor dy, Tensor x, Tensor pre, Tensor in_weight, Tensor? gate_weight, Tensor out_weight,"
    " Tensor down_weight, Tensor up_weight, Tensor? packed, Tensor? packed_out, str ffn_activation,"
    " str activation, float scale, float dropout_p, float activation_dropout_p,"
    " float output_dropout_p, Tensor? seed, bool separate, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.ffn_backward,
    _ffn_bwd_fake,
)
ffn_fwd.register(
    plans.ffn_forward,
    fused_or_plan(
        "ffn", "ffn.ffn_forward", plans.ffn_forward, lambda a: a[8].shape[0], frozen=(2, 4, 6, 13)
    ),
)
ffn_bwd.register(
    plans.ffn_backward,
    fused_or_plan(
        "ffn", "ffn.ffn_backward", plans.ffn_backward, lambda a: a[6].shape[0], frozen=(3, 4, 5, 9)
    ),
)


def _filled(packings, packed, packed_out, *weights):
    """packed and packed_out of one call: a site's own buffers, filled and kept from the others, or
    what the caller of the public function made."""
    if packings is None:
        return contextlib.nullcontext((packed, packed_out))
    return packings.filled(*weights)


class WidenedFFNFunction(OpFunction):
    """A frozen FFN with a parallel adapter, one function of x (M, K).

    Saves what the adapter read, x or adapter_x, and the pre-activations (M, F + R); T (M, R) alone
    of these when dx is not needed. ``packings`` are buffers that other calls write too: backward
    fills them again, with the weights that forward saved.
    """

    @staticmethod
    def forward(
        ctx, x, adapter_x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias,
        down_weight, down_bias, up_weight, up_bias, packed, packed_out, packings,
        *settings_and_seed,
    ):  # fmt: skip
        backend = active_backend()
        *settings, seed = settings_and_seed
        y, pre = _forward(
            x, adapter_x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias,
            down_weight, down_bias, up_weight, up_bias, packed, packed_out, packings, *settings,
            seed, True,
        )  # fmt: skip
        rank = down_weight.shape[0]
        if not ctx.needs_input_grad[0]:
            first = in_weight.shape[0] * (1 if gate_weight is None else 2)
            pre = pre[:, first : first + rank].contiguous()
        read = x if adapter_x is None else adapter_x
        ctx.save_for_backward(
            read if ctx.needs_input_grad[8] else None, pre, in_weight, gate_weight, out_weight,
            down_weight, up_weight, packed, packed_out, seed,
        )  # fmt: skip
        ctx.settings = (*settings, backend)
        ctx.separate = adapter_x is not None
        # only dx reads the frozen weights
        ctx.packings = packings if ctx.needs_input_grad[0] else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, pre, in_weight, gate_weight, out_weight, *small, packed, packed_out, seed = (
            ctx.saved_tensors
        )
        *settings, backend = ctx.settings
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[8:12], ctx.needs_input_grad[1]]
        weights = (in_weight, gate_weight, out_weight, *small)
        with _filled(ctx.packings, packed, packed_out, *weights, settings[SCALE]) as both:
            grads = ffn_bwd(
                dy.contiguous(), empty_like_nothing(dy) if x is None else x, pre, *weights, *both,
                *settings, seed, ctx.separate, needs, backend=backend,
            )  # fmt: skip
        dx, *small, d_adapter_x = keep_needed(grads, needs)
        return dx, d_adapter_x, *[None] * 6, *small, *[None] * 11

    @staticmethod
    def infer(*args):
        return _forward(*args, False)[0]


def _forward(*args):
    """y and pre of ``ffn_fwd``'s arguments, a site's packings behind ``packed_out``."""
    *first, packed, packed_out, packings = args[: PACKINGS + 1]
    _, _, in_weight, _, gate_weight, _, out_weight, _, down_weight, _, up_weight, _ = first
    settings = args[PACKINGS + 1 :]
    weights = in_weight, gate_weight, out_weight, down_weight, up_weight
    with _filled(packings, packed, packed_out, *weights, settings[SCALE]) as both:
        return ffn_fwd(*first, *both, *settings, backend=active_backend())
