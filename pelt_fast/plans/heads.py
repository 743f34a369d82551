"""Prefix attention as two attentions merged by log-sum-exp (identity I4).

Shapes and maths are those of ``reference.heads``.
The context runs on torch's own flash kernel, untouched: no concatenation, no widened mask, no
copy of the prefix for each batch row. Its backward kernel, given the merged o and the joint lse,
returns exact dq, dk, dv; the prefix part runs in C++ (csrc/cpu/prefix.cpp). Without it the queries
of all batch rows are the rows of one matrix a head, in blocks that stay in cache.
Traffic  beside attention without a prefix: q, o read and o written forward; q, o, do, dq read and
         dq written backward. Flops (S + P) / S of the attention's.

Where the flash kernel cannot go (attention dropout) the reference runs on one block of the batch at
a time: scores never take more than a block, however large the batch. Without a context the prefix
part is all there is.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pelt_fast.ops import native
from pelt_fast.reference import heads as reference
from pelt_fast.reference.heads import (
    causal_mask,
    expand_heads,
    heads_last,
    heads_last_empty,
    no_rng,
    reduce_heads,
)
from pelt_fast.reference.low_rank import empty_like_nothing

from .blocks import block_elements

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# scores of the prefix part worked on at a time, against a whole block's
PREFIX_SHARE = 8


def _batch_blocks(q: Tensor, width: int) -> Iterator[slice]:
    """Slices of the batch, each a block of scores, ``width`` for each query."""
    batch, heads, queries, _ = q.shape
    step = max(1, block_elements(q.device) // max(heads * queries * width, 1))
    return (slice(first, min(first + step, batch)) for first in range(0, batch, step))


def _by_head(x: Tensor) -> Tensor:
    """(B, H, T, D) as (H, B T, D): a view where x lies in memory as models hold it."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _prefix_blocks(q: Tensor, length: int) -> Iterator[slice]:
    """Slices of the B T queries of every head."""
    batch, heads, queries, _ = q.shape
    step = max(16, block_elements(q.device) // max(PREFIX_SHARE * heads * length, 1))
    rows = batch * queries
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def with_rows(t: Tensor) -> Tensor:
    """t with its last dim contiguous: torch's CPU flash kernel reads it so without a check."""
    return t if t.stride(-1) == 1 else t.contiguous()


def uses_flash(q: Tensor, k: Tensor, dropout_p: float) -> bool:
    """Whether the context, where there is one, can run on torch's CPU flash kernel."""
    return q.device.type == "cpu" and dropout_p == 0 and q.numel() > 0


def additive_mask(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor | None, bool, Tensor | None]:
    """The kernel's mask and causal flag, and the rows (.., T) that see no key at all.

    The kernel wants a mask of q's dtype, never beside its causal flag, and aligns that flag top
    left; it reports lse 0 for a row that sees nothing.
    """
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and (not causal or queries == keys):
        return None, causal, None
    if mask is None or mask.dtype == torch.bool:
        visible = causal_mask(queries, keys, q.device) if causal else None
        if mask is not None:
            visible = mask if visible is None else mask & visible
        additive = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        hidden = ~visible.any(-1)
    else:
        additive = mask.to(q.dtype)
        if causal:
            visible = causal_mask(queries, keys, q.device)
            additive = additive.masked_fill(~visible, float("-inf"))
        hidden = (additive == float("-inf")).all(-1)
    while additive.dim() < 4:
        additive, hidden = additive.unsqueeze(0), hidden.unsqueeze(0)
    return additive.expand(-1, -1, queries, keys), False, hidden.expand(-1, -1, queries)


def _prefix_weights(form: str, scores: Tensor, lse: Tensor) -> Tensor:
    """f of the scores (H, P, rows): queries last, so that reductions over the few prefix keys run
    along whole vectors. A prefix is always visible: lse is finite."""
    return scores.clamp_min(0) if form == "relu" else torch.exp(scores - lse.unsqueeze(-2))


def _context(q, k, v, attn_mask, is_causal, scale) -> tuple[Tensor, Tensor]:
    """o, laid out (B, T, H, D), and lse of the context, -inf for rows that see nothing."""
    if not k.numel():
        wide = torch.promote_types(q.dtype, torch.float32)
        return heads_last_empty(q).zero_(), q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    mask, causal, hidden = additive_mask(q, k, attn_mask, is_causal)
    o, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    o, lse = heads_last(o), lse.contiguous()
    if hidden is not None:
        lse.masked_fill_(hidden, float("-inf"))
    return o, lse


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
    settings = (is_causal, scale, form, composition, dropout_p, seed)
    q, k, v = map(with_rows, (q, k, v))
    if not uses_flash(q, k, dropout_p):
        return _blocked_forward(q, k, v, prefix_k, prefix_v, attn_mask, settings)
    o, lse = _context(q, k, v, attn_mask, is_causal, scale)
    context_o = empty_like_nothing(q) if composition == "gated" else o.clone()
    if native.covers_prefix(q, prefix_k.shape[1]):
        prefix = (p.detach().float() for p in (prefix_k, prefix_v))
        kind = (form == "relu", composition == "gated")
        native.ops().prefix_merge_(o, lse, q, *prefix, scale, *kind)
        return o, lse, context_o, no_rng(q, seed)
    queries, out, own = _by_head(q), _by_head(o), _by_head(lse.unsqueeze(-1)).squeeze(-1)
    pk, pv = (p.to(lse.dtype) for p in (prefix_k, prefix_v))
    by_scores = form == "relu" or o.dtype != lse.dtype
    if by_scores:
        pk, pv = scale * expand_heads(pk, q.shape[1]), expand_heads(pv, q.shape[1])
    for rows in _prefix_blocks(q, prefix_k.shape[1]):
        block = queries[:, rows], out[:, rows], own[:, rows]
        if by_scores:
            _merge_scores(*block, pk, pv, form, composition)
        else:
            _merge_outputs(*block, pk, pv, scale, composition)
    lse = own.view(lse.shape[1], lse.shape[0], lse.shape[2]).transpose(0, 1).contiguous()
    return o, lse, context_o, no_rng(q, seed)


def _merge_outputs(q, out, lse, pk, pv, scale, composition) -> None:
    """Merge a block of rows as the paper writes it, (1 - λ) h + λ Δh: Δh by the flash kernel, too,
    λ = sigmoid(l_p - l_c)."""
    update, prefix_lse = _flash(q[None], pk[None], pv[None], 0.0, False, scale=scale)
    if composition == "add":
        out += update[0]
        return
    out.lerp_(update[0], torch.sigmoid(prefix_lse[0] - lse).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, prefix_lse[0]))


def _merge_scores(q, out, lse, pk, pv, form, composition) -> None:
    """Merge a block of rows by its scores, in fp32 beside a lower precision: Δh is not rounded
    before it is added. pk is scaled, both have a head for each of q's."""
    scores = pk @ q.to(lse.dtype).transpose(-1, -2)  # (H, P, rows)
    prefix_lse = torch.logsumexp(scores, -2)
    context = out.to(lse.dtype)
    if composition == "gated":
        joint = torch.logaddexp(lse, prefix_lse)
        context *= torch.exp(lse - joint).unsqueeze(-1)
        prefix_lse = joint
        lse.copy_(joint)
    context.baddbmm_(_prefix_weights(form, scores, prefix_lse).transpose(-1, -2), pv)
    if context.dtype != out.dtype:
        out.copy_(context)


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
    do, q, k, v = map(with_rows, (do, q, k, v))
    tensors = (do, q, k, v, prefix_k, prefix_v, o, lse, context_o, context_rng)
    settings = (is_causal, scale, form, composition, dropout_p, seed)
    if not uses_flash(q, k, dropout_p):
        return _blocked_backward(tensors, attn_mask, settings, needs)
    grads = [empty_like_nothing(do) for _ in range(5)]
    if any(needs[:3]) and not k.numel():
        for i, like in enumerate((q, k, v)):
            grads[i] = heads_last_empty(like).zero_() if needs[i] else grads[i]
    elif any(needs[:3]):
        mask, causal, hidden = additive_mask(q, k, attn_mask, is_causal)
        own_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        if composition == "add" and hidden is not None:
            own_lse = own_lse.masked_fill(hidden, 0)  # as the kernel itself reports such a row
        own = o if composition == "gated" else context_o
        parts = _flash_backward(do, q, k, v, own, own_lse, 0.0, causal, attn_mask=mask, scale=scale)
        for i in range(3):
            if needs[i]:
                grads[i] = heads_last(parts[i])
    prefix_grads = _prefix_backward(tensors, settings, grads[0] if needs[0] else None)
    for i in (3, 4):
        if needs[i]:
            grads[i] = reduce_heads(prefix_grads[i - 3], prefix_k.shape[0]).to(prefix_k.dtype)
    return tuple(grads)


def _prefix_backward(tensors, settings, dq: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add the prefix's part to ``dq`` in place; return dpk, dpv (H, P, D), summed over the batch
    in one fixed order."""
    do, q, _, _, prefix_k, prefix_v, o, lse, *_ = tensors
    _, scale, form, composition, _, _ = settings
    wide, heads = lse.dtype, q.shape[1]
    if native.covers_prefix(q, prefix_k.shape[1]):
        prefix = [p.detach().float() for p in (prefix_k, prefix_v)]
        shape = (heads, *prefix_k.shape[1:])
        dpk, dpv = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
        do, o = (t if t.stride(-1) == 1 else t.contiguous() for t in (do, o))
        kind = (form == "relu", composition == "gated")
        native.ops().prefix_backward_(dq, dpk, dpv, do, q, *prefix, o, lse, scale, *kind)
        return dpk, dpv
    pk, pv = (expand_heads(p.to(wide), heads) for p in (prefix_k, prefix_v))
    pk = scale * pk
    dpk, dpv = torch.zeros_like(pk), torch.zeros_like(pv)
    queries, outer, merged = (_by_head(t) for t in (q, do, o))
    own = _by_head(lse.unsqueeze(-1)).squeeze(-1)
    grads = None if dq is None else _by_head(dq)
    for rows in _prefix_blocks(q, prefix_k.shape[1]):
        qb, dob = queries[:, rows].to(wide), outer[:, rows].to(wide)
        scores = pk @ qb.transpose(-1, -2)  # (H, P, rows)
        own_lse = own[:, rows] if composition == "gated" else torch.logsumexp(scores, -2)
        weights = _prefix_weights(form, scores, own_lse)
        dpv.baddbmm_(weights, dob)
        d_weights = pv @ dob.transpose(-1, -2)
        if form == "relu":
            d_scores = d_weights.mul_(scores > 0)
        elif composition == "gated":
            delta = (dob * merged[:, rows].to(wide)).sum(-1)
            d_scores = d_weights.sub_(delta.unsqueeze(-2)).mul_(weights)
        else:
            delta = (d_weights * weights).sum(-2, keepdim=True)
            d_scores = d_weights.sub_(delta).mul_(weights)
        dpk.baddbmm_(d_scores, qb)
        if grads is not None and grads.dtype == wide:
            grads[:, rows].baddbmm_(d_scores.transpose(-1, -2), pk)
        elif grads is not None:
            grads[:, rows] += d_scores.transpose(-1, -2) @ pk
    return dpk.mul_(scale), dpv


def _blocks_of(mask: Tensor | None, batch: slice) -> Tensor | None:
    return mask[batch] if mask is not None and mask.dim() == 4 and mask.shape[0] > 1 else mask


def _blocked_forward(q, k, v, prefix_k, prefix_v, mask, settings):
    wide = torch.promote_types(q.dtype, torch.float32)
    o = heads_last_empty(q)
    lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
    gated = settings[3] == "gated"
    context_o = empty_like_nothing(q) if gated else heads_last_empty(q)
    for batch in _batch_blocks(q, k.shape[2] + prefix_k.shape[1]):
        o[batch], lse[batch], kept, _ = reference.prefix_attention_forward(
            q[batch], k[batch], v[batch], prefix_k, prefix_v, _blocks_of(mask, batch),
            *settings, batch.start,
        )  # fmt: skip
        if not gated:
            context_o[batch] = kept
    return o, lse, context_o, no_rng(q, settings[-1])


def _blocked_backward(tensors, mask, settings, needs):
    do, q, k, v, prefix_k, prefix_v, o, lse, context_o, rng = tensors
    gated = settings[3] == "gated"
    grads = [empty_like_nothing(do) for _ in range(5)]
    for i, like in enumerate((q, k, v)):
        if needs[i]:
            grads[i] = heads_last_empty(like)
    for i in (3, 4):
        if needs[i]:
            grads[i] = torch.zeros_like(prefix_k, memory_format=torch.contiguous_format)
    for batch in _batch_blocks(q, k.shape[2] + prefix_k.shape[1]):
        block = reference.prefix_attention_backward(
            do[batch], q[batch], k[batch], v[batch], prefix_k, prefix_v, o[batch], lse[batch],
            context_o if gated else context_o[batch], rng, _blocks_of(mask, batch),
            *settings, needs, batch.start,
        )  # fmt: skip
        for i in range(3):
            if needs[i]:
                grads[i][batch] = block[i]
        for i in (3, 4):
            if needs[i]:
                grads[i] += block[i]
    return tuple(grads)
