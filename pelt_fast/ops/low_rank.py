"""Ops ``lora_*`` and ``adapter_*``: schemas, fakes, autograd Functions."""

import torch
from torch.autograd.function import once_differentiable

from pelt_fast.plans import low_rank as plans
from pelt_fast.reference import low_rank as reference
from pelt_fast.reference.low_rank import empty_like_nothing

from .backends import active_backend
from .function import OpFunction
from .fused import fused_or_plan
from .library import Op


def _lora_fwd_fake(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _lora_bwd_fake(dy, x, s, weight, lora_a, lora_b, scale, dropout_p, seed, needs):
    return (
        dy.new_empty(dy.shape[0], weight.shape[1]) if needs[0] else empty_like_nothing(dy),
        torch.empty_like(lora_a) if needs[1] else empty_like_nothing(dy),
        torch.empty_like(lora_b) if needs[2] else empty_like_nothing(dy),
    )


lora_fwd = Op(
    "lora_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale,"
    " float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
    reference.lora_forward,
    _lora_fwd_fake,
)
lora_bwd = Op(
    "lora_bwd",
    "(Tensor dy, Tensor x, Tensor s, Tensor weight, Tensor lora_a, Tensor lora_b, float scale,"
    " float dropout_p, Tensor? seed, bool[] needs) -> (Tensor, Tensor, Tensor)",
    reference.lora_backward,
    _lora_bwd_fake,
)
lora_fwd.register(
    plans.lora_forward,
    fused_or_plan(
        "lora", "low_rank.lora_forward", plans.lora_forward, lambda a: a[3].shape[0], frozen=(1,)
    ),
)
lora_bwd.register(
    plans.lora_backward,
    fused_or_plan(
        "lora", "low_rank.lora_backward", plans.lora_backward, lambda a: a[4].shape[0], frozen=(3,)
    ),
)


def keep_needed(grads, needs) -> list:
    """The gradients asked for, None for the rest."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class LoRALinearFunction(OpFunction):
    """y = x Wᵀ + b + s drop(x) Aᵀ Bᵀ on x (M, K).

    Saves x when A (or an unfrozen W) needs a gradient, S (M, R) when B does, nothing else but
    references to the parameters.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, dropout_p, seed):
        backend = active_backend()
        y, s = lora_fwd(x, weight, bias, lora_a, lora_b, scale, dropout_p, seed, backend=backend)
        _, need_w, _, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_a or need_w else None, s if need_b else None, weight, lora_a, lora_b, seed
        )
        ctx.settings = (scale, dropout_p, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, s, weight, lora_a, lora_b, seed = ctx.saved_tensors
        scale, dropout_p, backend = ctx.settings
        need_x, need_w, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        nothing = empty_like_nothing(dy)
        needs = [need_x, need_a, need_b]
        dy = dy.contiguous()
        grads = lora_bwd(
            dy, nothing if x is None else x, nothing if s is None else s, weight, lora_a, lora_b,
            scale, dropout_p, seed, needs, backend=backend,
        )  # fmt: skip
        dx, da, db = keep_needed(grads, needs)
        d_weight = dy.t() @ x if need_w else None
        d_bias = dy.sum(0) if need_bias else None
        return dx, d_weight, d_bias, da, db, None, None, None

    @staticmethod
    def infer(*args):
        return lora_fwd(*args, backend=active_backend())[0]


def _adapter_fwd_fake(
    x, base, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, layer_norm,
    activation, scale, dropout_p, seed, keep_t,
):  # fmt: skip
    y = x.new_empty(x.shape[0], up_weight.shape[0])
    t = x.new_empty(x.shape[0], down_weight.shape[0]) if keep_t else empty_like_nothing(x)
    return y, t


def _adapter_bwd_fake(
    dy, x, t, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, layer_norm,
    activation, scale, dropout_p, seed, sequential, needs,
):  # fmt: skip
    shapes = (
        x.shape, down_weight.shape, (down_weight.shape[0],), up_weight.shape,
        (up_weight.shape[0],), () if norm_weight is None else norm_weight.shape,
        () if norm_bias is None else norm_bias.shape,
    )  # fmt: skip
    dtypes = (x.dtype, *[down_weight.dtype] * 2, *[up_weight.dtype] * 2)
    dtypes += (dy.dtype, dy.dtype) if norm_weight is None else (norm_weight.dtype,) * 2
    return tuple(
        dy.new_empty(shape, dtype=dtype) if need else empty_like_nothing(dy)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


adapter_fwd = Op(
    "adapter_fwd",
    "(Tensor x, Tensor? base, Tensor down_weight, Tensor? down_bias, Tensor up_weight,"
    " Tensor? up_bias, Tensor? norm_weight, Tensor? norm_bias, str layer_norm, str activation,"
    " float scale, float dropout_p, Tensor? seed, bool keep_t) -> (Tensor, Tensor)",
    reference.adapter_forward,
    _adapter_fwd_fake,
)
adapter_bwd = Op(
    "adapter_bwd",
    "(Tensor dy, Tensor x, Tensor t, Tensor down_weight, Tensor? down_bias, Tensor up_weight,"
    " Tensor? up_bias, Tensor? norm_weight, Tensor? norm_bias, str layer_norm, str activation,"
    " float scale, float dropout_p, Tensor? seed, bool sequential, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.adapter_backward,
    _adapter_bwd_fake,
)
adapter_fwd.register(
    plans.adapter_forward,
    fused_or_plan(
        "adapter", "low_rank.adapter_forward", plans.adapter_forward, lambda a: a[2].shape[0]
    ),
)
adapter_bwd.register(
    plans.adapter_backward,
    fused_or_plan(
        "adapter", "low_rank.adapter_backward", plans.adapter_backward, lambda a: a[3].shape[0]
    ),
)


class AdapterFunction(OpFunction):
    """y = base + out(s (drop(f(in(x) Dᵀ + d)) Uᵀ + u)); ``base=None`` is the sequential adapter.

    Saves x (for D and an adapter LayerNorm) and T (M, R).
    """

    @staticmethod
    def forward(
        ctx, x, base, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias,
        layer_norm, activation, scale, dropout_p, seed,
    ):  # fmt: skip
        backend = active_backend()
        settings = (layer_norm, activation, scale, dropout_p, seed)
        y, t = adapter_fwd(
            x, base, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, *settings,
            True, backend=backend,
        )  # fmt: skip
        need_x = ctx.needs_input_grad[2] or layer_norm == "in"
        ctx.save_for_backward(
            x if need_x else None, t, down_weight, down_bias, up_weight, up_bias, norm_weight,
            norm_bias, seed,
        )  # fmt: skip
        ctx.settings = (layer_norm, activation, scale, dropout_p, base is None, backend)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, t, down_weight, *small, seed = ctx.saved_tensors
        layer_norm, activation, scale, dropout_p, sequential, backend = ctx.settings
        need_x, need_base, *needs = ctx.needs_input_grad[:8]
        needs = [need_x, *needs]
        dy = dy.contiguous()
        # what stands in for an x that was not saved has its shape, but the storage of a row
        x = dy.new_empty(down_weight.shape[1]).expand(dy.shape[0], -1) if x is None else x
        grads = adapter_bwd(
            dy, x, t, down_weight, *small, layer_norm, activation, scale, dropout_p, seed,
            sequential, needs, backend=backend,
        )  # fmt: skip
        dx, *rest = keep_needed(grads, needs)
        return dx, dy if need_base else None, *rest, None, None, None, None, None

    @staticmethod
    def infer(*args):
        return adapter_fwd(*args, False, backend=active_backend())[0]
