"""Prefix attention as two attentions merged by log-sum-exp (docs/maths.md#i4).

Shapes and maths are those of ``reference``.
The context runs on torch's own flash kernel, untouched: no concatenation, no widened mask, no
copy of the prefix for each batch row. Its backward kernel, given the merged o and the joint lse,
returns exact dq, dk, dv; the prefix part runs in C++ (csrc/cpu/prefix.cpp). Without it the queries
of all batch rows are the rows of one matrix a head, in blocks that stay in cache.
Traffic  beside attention without a prefix: q, o read and o written forward; q, o, do, dq read and
         dq written backward. Flops (S + P) / S of the attention's.

Where the flash kernel cannot go (attention dropout) the specification runs in blocks. Without a
context the prefix part is all there is.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common.bundles import (
    QKV,
    AttentionOutput,
    Dropout,
    Form,
    Prefix,
    Scores,
    absent,
)
from pelt_fast.ops.common.chunking import block_elements
from pelt_fast.ops.common.heads import (
    additive_mask,
    expand_heads,
    heads_last,
    heads_last_empty,
    no_rng,
    reduce_heads,
)
from pelt_fast.ops.common.passes import covers_rows, cpp

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

MAX_PREFIX, MAX_HEAD_DIM = 256, 128  # kMaxPrefix and kColumns of csrc/cpu
PREFIX_SHARE = 8  # scores of the prefix part worked on at a time, against a whole block's


def _by_head(x: Tensor) -> Tensor:
    """(B, H, T, D) as (H, B T, D): a view where x is in memory as models hold it."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)


def _rows_by_head(lse: Tensor) -> Tensor:
    """(B, H, T) as (H, B T)."""
    return _by_head(lse.unsqueeze(-1)).squeeze(-1)


def _prefix_blocks(q: Tensor, length: int) -> Iterator[slice]:
    """Slices of the B T queries of every head."""
    batch, heads, queries, _ = q.shape
    step = max(16, block_elements(q.device) // max(PREFIX_SHARE * heads * length, 1))
    rows = batch * queries
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _covers(q: Tensor, length: int) -> bool:
    """Whether the C++ takes queries (B, H, T, D) and a prefix length."""
    return covers_rows(q) and 1 <= length <= MAX_PREFIX and q.shape[-1] <= MAX_HEAD_DIM


def with_rows(t: Tensor) -> Tensor:
    """t with its last dim contiguous: torch's CPU flash kernel reads it so without a check."""
    return t if t.stride(-1) == 1 else t.contiguous()


def uses_flash(q: Tensor, dropout_p: float) -> bool:
    """Whether the context, where there is one, can run on torch's CPU flash kernel."""
    return q.device.type == "cpu" and dropout_p == 0 and q.numel() > 0


def _prefix_weights(form: str, scores: Tensor, lse: Tensor) -> Tensor:
    """f of the scores (H, P, rows): queries last, so that reductions over the few prefix keys run
    along whole vectors. A prefix is always visible: lse is finite."""
    return scores.clamp_min(0) if form == "relu" else torch.exp(scores - lse.unsqueeze(-2))


def _context(qkv: QKV, scores: Scores) -> tuple[Tensor, Tensor]:
    """o, laid out (B, T, H, D), and lse of the context, -inf for rows that see nothing."""
    q, k, v = qkv
    if not k.numel():
        wide = torch.promote_types(q.dtype, torch.float32)
        return heads_last_empty(q).zero_(), q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    mask, causal, hidden = additive_mask(q, k, scores.attn_mask, scores.is_causal)
    o, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scores.scale)
    o, lse = heads_last(o), lse.contiguous()
    if hidden is not None:
        lse.masked_fill_(hidden, float("-inf"))
    return o, lse


def prefix_attention_forward(
    qkv: QKV, prefix: Prefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, gated, scale = qkv.q, form.composition == "gated", scores.scale
    if not uses_flash(q, drop.dropout_p):
        return NotImplemented
    qkv = QKV(*map(with_rows, qkv))
    q = qkv.q
    o, lse = _context(qkv, scores)
    context_o = absent(q) if gated else o.clone()
    if _covers(q, prefix.prefix_k.shape[1]):
        wide = (p.detach().float() for p in prefix)
        cpp.prefix_merge_(o, lse, q, *wide, scale, form.form == "relu", gated)
        return o, lse, context_o, no_rng(q, drop.seed)
    queries, out, own = _by_head(q), _by_head(o), _rows_by_head(lse)
    prefix = Prefix(*(p.to(lse.dtype) for p in prefix))
    by_scores = form.form == "relu" or o.dtype != lse.dtype
    if by_scores:
        pk, pv = (expand_heads(p, q.shape[1]) for p in prefix)
        prefix = Prefix(scale * pk, pv)
    for rows in _prefix_blocks(q, prefix.prefix_k.shape[1]):
        block = queries[:, rows], out[:, rows], own[:, rows]
        if by_scores:
            _merge_scores(*block, prefix, form)
        else:
            _merge_outputs(*block, prefix, scale, form.composition)
    lse = own.view(lse.shape[1], lse.shape[0], lse.shape[2]).transpose(0, 1).contiguous()
    return o, lse, context_o, no_rng(q, drop.seed)


def _merge_outputs(
    q: Tensor, out: Tensor, lse: Tensor, prefix: Prefix, scale: float, composition: str
) -> None:
    """Merge a block of rows as the paper writes it, (1 - λ) h + λ Δh: Δh by the flash kernel, too,
    λ = sigmoid(l_p - l_c)."""
    update, prefix_lse = _flash(q[None], *(p[None] for p in prefix), 0.0, False, scale=scale)
    if composition == "add":
        out += update[0]
        return
    out.lerp_(update[0], torch.sigmoid(prefix_lse[0] - lse).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, prefix_lse[0]))


def _merge_scores(q: Tensor, out: Tensor, lse: Tensor, prefix: Prefix, form: Form) -> None:
    """Merge a block of rows by its scores, in fp32 beside a lower precision: Δh is not rounded
    before it is added. The prefix's keys are scaled, both have a head for each of q's."""
    pk, pv = prefix
    scores = pk @ q.to(lse.dtype).transpose(-1, -2)  # (H, P, rows)
    prefix_lse = torch.logsumexp(scores, -2)
    context = out.to(lse.dtype)
    if form.composition == "gated":
        joint = torch.logaddexp(lse, prefix_lse)
        context *= torch.exp(lse - joint).unsqueeze(-1)
        prefix_lse = joint
        lse.copy_(joint)
    context.baddbmm_(_prefix_weights(form.form, scores, prefix_lse).transpose(-1, -2), pv)
    if context.dtype != out.dtype:
        out.copy_(context)


def prefix_attention_backward(
    do: Tensor,
    qkv: QKV,
    prefix: Prefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not uses_flash(qkv.q, drop.dropout_p):
        return NotImplemented
    do, qkv = with_rows(do), QKV(*map(with_rows, qkv))
    grads = [absent(do) for _ in range(5)]
    if any(needs[:3]):
        parts = _context_backward(do, qkv, output, scores, form.composition)
        for i in range(3):
            grads[i] = parts[i] if needs[i] else grads[i]
    dq = grads[0] if needs[0] else None
    prefix_grads = _prefix_backward(do, qkv.q, prefix, output, scores.scale, form, dq)
    for i, (grad, like) in enumerate(zip(prefix_grads, prefix), 3):
        if needs[i]:
            grads[i] = reduce_heads(grad, prefix.prefix_k.shape[0]).to(like.dtype)
    return tuple(grads)


def _context_backward(
    do: Tensor, qkv: QKV, output: AttentionOutput, scores: Scores, composition: str
) -> tuple[Tensor, ...]:
    """dq, dk, dv of the context, laid out as the model holds them."""
    q, k, v = qkv
    if not k.numel():
        return tuple(heads_last_empty(like).zero_() for like in qkv)
    mask, causal, hidden = additive_mask(q, k, scores.attn_mask, scores.is_causal)
    lse = output.lse.transpose(1, 2).contiguous().transpose(1, 2)
    if composition == "add" and hidden is not None:
        lse = lse.masked_fill(hidden, 0)  # as the kernel itself reports such a row
    own = output.o if composition == "gated" else output.context_o
    parts = _flash_backward(do, q, k, v, own, lse, 0.0, causal, attn_mask=mask, scale=scores.scale)
    return tuple(map(heads_last, parts))


def _prefix_backward(
    do: Tensor,
    q: Tensor,
    prefix: Prefix,
    output: AttentionOutput,
    scale: float,
    form: Form,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add the prefix's part to ``dq`` in place; return dpk, dpv (H, P, D), summed over the batch
    in one fixed order."""
    (o, lse, _, _), heads, length = output, q.shape[1], prefix.prefix_k.shape[1]
    if _covers(q, length):
        wide = [p.detach().float() for p in prefix]
        shape = (heads, *prefix.prefix_k.shape[1:])
        dpk, dpv = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
        do, o = with_rows(do), with_rows(o)
        kind = (form.form == "relu", form.composition == "gated")
        cpp.prefix_backward_(dq, dpk, dpv, do, q, *wide, o, lse, scale, *kind)
        return dpk, dpv
    pk, pv = (expand_heads(p.to(lse.dtype), heads) for p in prefix)
    wide = Prefix(scale * pk, pv)
    grads = torch.zeros_like(wide.prefix_k), torch.zeros_like(pv)
    queries, outer, merged = (_by_head(t) for t in (q, do, o))
    own, query_grads = _rows_by_head(lse), None if dq is None else _by_head(dq)
    for rows in _prefix_blocks(q, length):
        block = QKV(queries[:, rows], outer[:, rows], merged[:, rows])
        d_scores = _block_backward(block, wide, own[:, rows], form, grads)
        if query_grads is not None and query_grads.dtype == lse.dtype:
            query_grads[:, rows].baddbmm_(d_scores.transpose(-1, -2), wide.prefix_k)
        elif query_grads is not None:
            query_grads[:, rows] += d_scores.transpose(-1, -2) @ wide.prefix_k
    return grads[0].mul_(scale), grads[1]


def _block_backward(
    block: QKV, prefix: Prefix, lse: Tensor, form: Form, grads: tuple[Tensor, Tensor]
) -> Tensor:
    """Add a block of rows, its (q, do, o), to the prefix's gradients; return that of its scores."""
    q, do, o = block
    qb, dob = q.to(lse.dtype), do.to(lse.dtype)
    scores = prefix.prefix_k @ qb.transpose(-1, -2)  # (H, P, rows)
    lse = lse if form.composition == "gated" else torch.logsumexp(scores, -2)
    weights = _prefix_weights(form.form, scores, lse)
    grads[1].baddbmm_(weights, dob)
    d_weights = prefix.prefix_v @ dob.transpose(-1, -2)
    if form.form == "relu":
        d_scores = d_weights.mul_(scores > 0)
    elif form.composition == "gated":
        delta = (dob * o.to(lse.dtype)).sum(-1)
        d_scores = d_weights.sub_(delta.unsqueeze(-2)).mul_(weights)
    else:
        delta = (d_weights * weights).sum(-2, keepdim=True)
        d_scores = d_weights.sub_(delta).mul_(weights)
    grads[0].baddbmm_(d_scores, qb)
    return d_scores
