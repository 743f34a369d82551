"""Prefix attention: the library's context kernel and one Triton merge, forward and backward.

Shapes and maths are those of ``reference.heads``.
Traffic  beside attention without a prefix, in passes of B H T D: q, o_c, o forward 3; q, do, o, dq
         read and dq written backward 5 (P <= 64). Flops (S + P) / S of the attention's.
Saved    q, k, v, o, lse, what attention without a prefix saves; added forms keep o_c as well.
"""

import torch

from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.plans import heads as plans
from pelt_fast.reference.heads import heads_last, heads_last_empty, no_rng
from pelt_fast.reference.low_rank import empty_like_nothing

from .context import context_backward, context_forward


def _blocked(q, dropout_p: float) -> bool:
    """The CPU (the kernels interpreted) has no flash kernel with dropout: the plan's case."""
    return q.device.type == "cpu" and dropout_p > 0


def prefix_attention_forward(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    attn_mask,
    is_causal,
    scale,
    form,
    composition,
    dropout_p,
    seed,
):
    if _blocked(q, dropout_p):
        return plans.prefix_attention_forward(
            q, k, v, prefix_k, prefix_v, attn_mask, is_causal, scale, form, composition,
            dropout_p, seed,
        )  # fmt: skip
    context_o = context_lse = rng = None
    if q.numel() and k.numel():
        context_o, context_lse, rng = context_forward(
            q, k, v, attn_mask, is_causal, scale, dropout_p
        )
    o = heads_last_empty(q)
    lse = prefix_merge(
        q, prefix_k, prefix_v, context_o, context_lse, o, scale=scale, form=form,
        composition=composition, dropout_p=dropout_p, seed=None if seed is None else seed[0],
    )  # fmt: skip
    kept = empty_like_nothing(q)
    if composition == "add":
        kept = torch.zeros_like(o) if context_o is None else heads_last(context_o)
        kept = kept.masked_fill(lse.unsqueeze(-1) == float("-inf"), 0)
    return o, lse, kept, no_rng(q, seed) if rng is None else rng


def prefix_attention_backward(
    do,
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    o,
    lse,
    context_o,
    context_rng,
    attn_mask,
    is_causal,
    scale,
    form,
    composition,
    dropout_p,
    seed,
    needs,
):
    if _blocked(q, dropout_p):
        return plans.prefix_attention_backward(
            do, q, k, v, prefix_k, prefix_v, o, lse, context_o, context_rng, attn_mask, is_causal,
            scale, form, composition, dropout_p, seed, needs,
        )  # fmt: skip
    grads = [empty_like_nothing(do) for _ in range(5)]
    parts = (None, None, None)
    if any(needs[:3]) and not (q.numel() and k.numel()):
        parts = tuple(heads_last_empty(t).zero_() for t in (q, k, v))
    elif any(needs[:3]):
        own = o if composition == "gated" else context_o
        rng = context_rng if dropout_p > 0 else None
        parts = context_backward(do, q, k, v, own, lse, rng, attn_mask, is_causal, scale, dropout_p)
    dq = parts[0] if needs[0] else None
    if needs[0] or needs[3] or needs[4]:
        prefix_grads = prefix_merge_bwd(
            do, q, prefix_k, prefix_v, o, lse, dq, scale=scale, form=form,
            composition=composition, dropout_p=dropout_p, seed=None if seed is None else seed[0],
        )  # fmt: skip
        parts = (*parts, *prefix_grads)
    return tuple(
        part if need else grad
        for part, grad, need in zip((*parts, *grads[len(parts) :]), grads, needs, strict=True)
    )
