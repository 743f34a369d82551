"""Ops ``prefix_attention_*``: schemas, fakes, autograd Function."""

import torch
from torch.autograd.function import once_differentiable

from pelt_fast.plans import heads as plans
from pelt_fast.reference import heads as reference
from pelt_fast.reference.heads import heads_last_empty
from pelt_fast.reference.low_rank import empty_like_nothing

from .backends import active_backend
from .function import OpFunction
from .fused import fused_or_plan
from .library import Op
from .low_rank import keep_needed


def _prefix_attention_fwd_fake(
    q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale, form, composition, dropout_p, seed
):
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    context_o = empty_like_nothing(q) if composition == "gated" else heads_last_empty(q)
    rng = q.new_empty(0 if seed is None else 2, dtype=torch.int64)
    return heads_last_empty(q), lse, context_o, rng


def _prefix_attention_bwd_fake(
    do, q, k, v, prefix_k, prefix_v, o, lse, context_o, context_rng, attn_mask, is_causal, scale,
    form, composition, dropout_p, seed, needs,
):  # fmt: skip
    grads = [*map(heads_last_empty, (q, k, v)), *map(torch.empty_like, (prefix_k, prefix_v))]
    return tuple(
        grad if need else empty_like_nothing(do) for grad, need in zip(grads, needs, strict=True)
    )


prefix_attention_fwd = Op(
    "prefix_attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? attn_mask,"
    " bool is_causal, float scale, str form, str composition, float dropout_p, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.prefix_attention_forward,
    _prefix_attention_fwd_fake,
)
prefix_attention_bwd = Op(
    "prefix_attention_bwd",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor o,"
    " Tensor lse, Tensor context_o, Tensor context_rng, Tensor? attn_mask, bool is_causal,"
    " float scale, str form, str composition, float dropout_p, Tensor? seed, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference.prefix_attention_backward,
    _prefix_attention_bwd_fake,
)
prefix_attention_fwd.register(
    plans.prefix_attention_forward,
    fused_or_plan(
        "prefix", "heads.prefix_attention_forward", reference.prefix_attention_forward,
        lambda a: a[3].shape[1],
    ),
)  # fmt: skip
prefix_attention_bwd.register(
    plans.prefix_attention_backward,
    fused_or_plan(
        "prefix", "heads.prefix_attention_backward", reference.prefix_attention_backward,
        lambda a: a[4].shape[1],
    ),
)  # fmt: skip


class PrefixAttentionFunction(OpFunction):
    """Attention with P trainable keys and values beside the context (B, H, T, D).

    Saves q, k, v, o and lse, what attention without a prefix saves, and the prefix.
    """

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, attn_mask, *settings_and_seed):
        backend = active_backend()
        *settings, seed = settings_and_seed
        o, lse, *context = prefix_attention_fwd(
            q, k, v, prefix_k, prefix_v, attn_mask, *settings, seed, backend=backend
        )
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, o, lse, *context, attn_mask, seed)
        ctx.settings = (*settings, backend)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        *tensors, attn_mask, seed = ctx.saved_tensors
        *settings, backend = ctx.settings
        needs = list(ctx.needs_input_grad[:5])
        # an expanded gradient (of a sum): backward runs where forward did, whose masks these are
        do = do if do.stride(-1) == 1 else do.contiguous()
        grads = prefix_attention_bwd(
            do, *tensors, attn_mask, *settings, seed, needs, backend=backend
        )  # fmt: skip
        return *keep_needed(grads, needs), *[None] * 7

    @staticmethod
    def infer(*args):
        return prefix_attention_fwd(*args, backend=active_backend())[0]
