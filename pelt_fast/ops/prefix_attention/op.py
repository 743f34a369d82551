"""Prefix attention's ops: schemas, fakes and autograd's Functions. One prefix is that of the whole
batch; or each row of the batch has that of its own method."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pelt_fast.ops.common.backends import active
from pelt_fast.ops.common.bundles import (
    NOTHING,
    QKV,
    Dropout,
    Form,
    Prefix,
    RoutedPrefix,
    Scores,
    absent,
    unflatten,
)
from pelt_fast.ops.common.dropout import draw_seeds
from pelt_fast.ops.common.heads import heads_last_empty
from pelt_fast.ops.common.library import Op, OpFunction, keep_needed, run

from . import cpu, reference

GPU = "pelt_fast.ops.prefix_attention.gpu"


def _forward_fake(qkv: QKV, prefix, scores, form: Form, drop: Dropout):
    q = qkv.q
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    context_o = absent(q) if form.composition == "gated" else heads_last_empty(q)
    rng = q.new_empty(0 if drop.seed is None else 2, dtype=torch.int64)
    return heads_last_empty(q), lse, context_o, rng


def _backward_fake(do, qkv: QKV, prefix, output, scores, form, drop, needs: Sequence[bool]):
    grads = [*map(heads_last_empty, qkv), *map(torch.empty_like, prefix[:2])]
    return tuple(grad if need else absent(do) for grad, need in zip(grads, needs, strict=True))


prefix_attention_fwd = Op("prefix_attention_fwd", reference.prefix_attention_forward, _forward_fake)
prefix_attention_bwd = Op(
    "prefix_attention_bwd", reference.prefix_attention_backward, _backward_fake
)
prefix_attention_fwd.on_cpu(
    cpu.prefix_attention_forward, reference.prefix_attention_forward_in_blocks
)
prefix_attention_bwd.on_cpu(
    cpu.prefix_attention_backward, reference.prefix_attention_backward_in_blocks
)
for _op, _name, _plain in (
    (prefix_attention_fwd, "prefix_attention_forward", reference.prefix_attention_forward),
    (prefix_attention_bwd, "prefix_attention_backward", reference.prefix_attention_backward),
):
    _op.on_gpu(f"{GPU}:{_name}", "prefix", size=("prefix_k", 1), without=_plain)

routed_prefix_fwd = Op("routed_prefix_fwd", reference.routed_prefix_forward, _forward_fake)
routed_prefix_bwd = Op("routed_prefix_bwd", reference.routed_prefix_backward, _backward_fake)
routed_prefix_fwd.on_cpu(cpu.routed_prefix_forward, reference.routed_prefix_forward_in_blocks)
routed_prefix_bwd.on_cpu(cpu.routed_prefix_backward, reference.routed_prefix_backward_in_blocks)
for _op, _name, _plain in (
    (routed_prefix_fwd, "routed_prefix_forward", reference.routed_prefix_forward),
    (routed_prefix_bwd, "routed_prefix_backward", reference.routed_prefix_backward),
):
    _op.on_gpu(f"{GPU}:{_name}", "prefix", size=("lengths", None), without=_plain)

prefix_step = cpu.prefix_step

_arguments = unflatten(QKV, Prefix, Scores, Form, Dropout)
_routed_arguments = unflatten(QKV, RoutedPrefix, Scores, Form, Dropout)


class PrefixAttentionFunction(OpFunction):
    """Attention with P trainable keys and values beside the context (B, H, T, D).

    Saves q, k, v, o and lse, like attention without a prefix, and the prefix.
    """

    @staticmethod
    def forward(ctx, *args):
        qkv, prefix, scores, form, drop = _arguments(*args)
        backend = active.name
        output = prefix_attention_fwd(*args, backend=backend)
        ctx.save_for_backward(*qkv, *prefix, *output, scores.attn_mask, drop.seed)
        ctx.settings = (scores.is_causal, scores.scale, *form, drop.dropout_p)
        ctx.backend = backend
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        *tensors, attn_mask, seed = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        # an expanded gradient (of a sum) has stride 0: backward must run on forward's kernels
        do = do if do.stride(-1) == 1 else do.contiguous()
        grads = prefix_attention_bwd(
            do, *tensors, attn_mask, *ctx.settings, seed, needs, backend=ctx.backend
        )
        nothing = (*NOTHING[Scores], *NOTHING[Form], *NOTHING[Dropout])
        return *keep_needed(grads, needs), *nothing

    @staticmethod
    def infer(*args):
        return prefix_attention_fwd(*args, backend=active.name)[0]


class RoutedPrefixFunction(OpFunction):
    """Attention of each row of the batch with the trainable keys and values of its own method.

    Saves what :class:`PrefixAttentionFunction` saves, all methods' prefixes, and the routes.
    """

    @staticmethod
    def forward(ctx, *args):
        qkv, prefix, scores, form, drop = _routed_arguments(*args)
        backend = active.name
        output = routed_prefix_fwd(*args, backend=backend)
        *small, lengths = prefix
        ctx.save_for_backward(*qkv, *small, *output, scores.attn_mask, drop.seed)
        ctx.settings = (scores.is_causal, scores.scale, *form, drop.dropout_p)
        ctx.lengths, ctx.backend = lengths, backend
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        saved = ctx.saved_tensors  # read once: a checkpoint gives them once
        tensors, (*output, attn_mask, seed) = saved[:6], saved[6:]
        needs = list(ctx.needs_input_grad[:5])
        do = do if do.stride(-1) == 1 else do.contiguous()
        grads = routed_prefix_bwd(
            do, *tensors, ctx.lengths, *output, attn_mask, *ctx.settings, seed, needs,
            backend=ctx.backend,
        )  # fmt: skip
        nothing = (None, None, *NOTHING[Scores], *NOTHING[Form], *NOTHING[Dropout])
        return *keep_needed(grads, needs), *nothing

    @staticmethod
    def infer(*args):
        return routed_prefix_fwd(*args, backend=active.name)[0]


def attention_with_prefix(
    qkv: QKV, prefix: Prefix, scores: Scores, form: Form, dropout_p: float, training: bool
) -> Tensor:
    """Prefix attention. The arguments were checked; the dropouts' seeds are drawn here."""
    drop = _drawn(qkv.q, dropout_p, training)
    return run(PrefixAttentionFunction, *qkv, *prefix, *scores, *form, *drop)


def attention_with_routed_prefix(
    qkv: QKV, prefix: RoutedPrefix, scores: Scores, form: Form, dropout_p: float, training: bool
) -> Tensor:
    """Attention with each row's own prefix (B, H, T, D), as :func:`attention_with_prefix`."""
    drop = _drawn(qkv.q, dropout_p, training)
    return run(RoutedPrefixFunction, *qkv, *prefix, *scores, *form, *drop)


def _drawn(q: Tensor, dropout_p: float, training: bool) -> Dropout:
    seed = draw_seeds(q, training, dropout_p, dropout_p) if dropout_p else None
    return Dropout(0.0 if seed is None else dropout_p, seed)
