"""Prefix attention as two attentions merged by log-sum-exp (docs/maths.md#i4).

Shapes and maths are those of ``reference``.
The context runs on torch's own flash kernel, unchanged: no concatenation, no wider mask, no copy of
the prefix for each batch row. Its backward kernel gets the merged o and the joint lse, and returns
exact dq, dk, dv. The prefix part runs in C++ (csrc/cpu/prefix.cpp). Without C++, the queries of all
batch rows are the rows of one matrix for each head, in blocks that stay in cache.
Traffic  in addition to attention without a prefix: q, o read and o written forward; q, o, do, dq
         read and dq written backward. Flops (S + P) / S of the attention's.

A few queries that no mask restricts, as in a decoder's step, need one call: C++ attends over prefix
and context (csrc/cpu/prefix_few.cpp).
If the flash kernel cannot run (attention dropout), the specification runs in blocks. Without a
context only the prefix part runs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common.batch import methods_of, output_of, prefix_at
from pelt_fast.ops.common.bundles import (
    QKV,
    AttentionOutput,
    Dropout,
    Form,
    Prefix,
    RoutedPrefix,
    Scores,
    absent,
)
from pelt_fast.ops.common.context import (
    context_attention,
    context_gradients,
    flash,
    uses_flash,
    with_rows,
)
from pelt_fast.ops.common.dropout import block_elements
from pelt_fast.ops.common.heads import expand_heads, heads_last, no_rng, reduce_heads
from pelt_fast.ops.common.passes import covers_rows, cpp

MAX_PREFIX, MAX_HEAD_DIM = 256, 128  # kMaxPrefix and kColumns of csrc/cpu
FEW_QUERIES, HEAD_DIM_STEP = 8, 16  # kFewQueries and kPad of csrc/cpu
PREFIX_SHARE = 8  # a step of the prefix part has 1 / 8 of the scores of a whole block


def _by_head(x: Tensor) -> Tensor:
    """(B, H, T, D) as (H, B T, D): a view if x has the memory layout of the models."""
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


def _prefix_weights(form: str, scores: Tensor, lse: Tensor) -> Tensor:
    """f of the scores (H, P, rows): queries last, so that reductions over the few prefix keys run
    along whole vectors. A prefix is always visible: lse is finite."""
    return scores.clamp_min(0) if form == "relu" else torch.exp(scores - lse.unsqueeze(-2))


def prefix_attention_forward(
    qkv: QKV, prefix: Prefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, gated, scale = qkv.q, form.composition == "gated", scores.scale
    if not uses_flash(q, drop.dropout_p):
        return NotImplemented
    if gated and _is_step(qkv, prefix, scores):
        return _step(qkv, prefix, scale)
    qkv = QKV(*map(with_rows, qkv))
    q = qkv.q
    o, lse = context_attention(qkv, scores)
    context_o, rng = absent(q) if gated else o.clone(), no_rng(q, drop.seed)
    return o, _merge(q, o, lse, prefix, scale, form), context_o, rng


def routed_prefix_forward(
    qkv: QKV, prefix: RoutedPrefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not uses_flash(qkv.q, drop.dropout_p):
        return NotImplemented
    qkv = QKV(*map(with_rows, qkv))
    q = qkv.q
    o, lse = context_attention(qkv, scores)
    context_o = absent(q) if form.composition == "gated" else o.clone()
    for rows, keys in methods_of(prefix):
        if keys.start < keys.stop:
            own = heads_last(o[rows])
            lse[rows] = _merge(
                heads_last(q[rows]), own, lse[rows], prefix_at(prefix, keys), scores.scale, form
            )
            o[rows] = own
    return o, lse, context_o, no_rng(q, drop.seed)


def _covered(q: Tensor, length: int) -> bool:
    """Whether C++ takes a prefix of this length beside q."""
    return covers_rows(q) and length <= MAX_PREFIX and q.shape[-1] <= MAX_HEAD_DIM


def _merge(q: Tensor, o: Tensor, lse: Tensor, prefix: Prefix, scale: float, form: Form) -> Tensor:
    """Merge a prefix of all rows into ``o``, laid out (B, T, H, D), in place; return the lse."""
    if _covered(q, prefix.prefix_k.shape[1]):
        pk, pv = prefix.prefix_k.detach().float(), prefix.prefix_v.detach().float()
        kind = form.form == "relu", form.composition == "gated"
        cpp.prefix_merge_(o, lse, q, pk, pv, scale, *kind)
        return lse
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
    return own.view(lse.shape[1], lse.shape[0], lse.shape[2]).transpose(0, 1).contiguous()


def _is_step(qkv: QKV, prefix: Prefix, scores: Scores) -> bool:
    """Whether C++ runs prefix and context in one call: a few queries that see every key, as in a
    decoder's step."""
    q, k, v = qkv
    queries, dim = q.shape[2:]
    if queries > FEW_QUERIES or scores.attn_mask is not None or (scores.is_causal and queries > 1):
        return False
    rows = q.stride(3) == k.stride(3) == v.stride(3) == 1 and dim % HEAD_DIM_STEP == 0
    fits = dim <= MAX_HEAD_DIM and prefix.prefix_k.shape[1] <= MAX_PREFIX and k.shape[2] > 0
    small = prefix.prefix_k.stride(2) == prefix.prefix_v.stride(2) == 1
    return rows and fits and small and covers_rows(q)


def _step(qkv: QKV, prefix: Prefix, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, nothing = qkv.q, absent(qkv.q)
    o = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cpp.prefix_few_queries_(o, lse, *qkv, *(p.detach().float() for p in prefix), scale)
    return o, lse, nothing, q.new_empty(0, dtype=torch.int64)


def _merge_outputs(
    q: Tensor, out: Tensor, lse: Tensor, prefix: Prefix, scale: float, composition: str
) -> None:
    """Merge a block of rows as in the paper, (1 - λ) h + λ Δh. The flash kernel computes Δh, too;
    λ = sigmoid(l_p - l_c)."""
    update, prefix_lse = flash(q[None], *(p[None] for p in prefix), 0.0, False, scale=scale)
    if composition == "add":
        out += update[0]
        return
    out.lerp_(update[0], torch.sigmoid(prefix_lse[0] - lse).unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, prefix_lse[0]))


def _merge_scores(q: Tensor, out: Tensor, lse: Tensor, prefix: Prefix, form: Form) -> None:
    """Merge a block of rows by its scores, in fp32 if q is less precise: Δh is not rounded
    before it is added. The prefix's keys are scaled; the prefix has a head for each of q's."""
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
    grads = _of_context(do, qkv, output, scores, form, needs)
    grads[3:] = _of_prefix(do, qkv.q, prefix, output, scores.scale, form, grads[0])
    return tuple(grad if need else absent(do) for grad, need in zip(grads, needs, strict=True))


def routed_prefix_backward(
    do: Tensor,
    qkv: QKV,
    prefix: RoutedPrefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if not uses_flash(qkv.q, drop.dropout_p):
        return NotImplemented
    do, qkv = with_rows(do), QKV(*map(with_rows, qkv))
    q, grads = qkv.q, _of_context(do, qkv, output, scores, form, needs)
    grads[3:] = (torch.zeros_like(p, memory_format=torch.contiguous_format) for p in prefix[:2])
    for rows, keys in methods_of(prefix):
        if keys.start == keys.stop:
            continue
        own, dq = prefix_at(prefix, keys), None if grads[0] is None else heads_last(grads[0][rows])
        parts = _of_prefix(do[rows], q[rows], own, output_of(output, rows), scores.scale, form, dq)
        if dq is not None:
            grads[0][rows] = dq
        for grad, part in zip(grads[3:], parts):
            grad[:, keys] = part
    return tuple(grad if need else absent(do) for grad, need in zip(grads, needs, strict=True))


def _of_context(
    do: Tensor, qkv: QKV, output: AttentionOutput, scores: Scores, form: Form, needs: Sequence[bool]
) -> list[Tensor | None]:
    """dq, dk, dv of the context, if they are needed, and places for those of the prefix."""
    if not any(needs[:3]):
        return [None] * 5
    own = output.o if form.composition == "gated" else output.context_o
    parts = context_gradients(do, qkv, own, output.lse, scores)
    return [*(part if need else None for part, need in zip(parts, needs)), None, None]


def _of_prefix(
    do: Tensor,
    q: Tensor,
    prefix: Prefix,
    output: AttentionOutput,
    scale: float,
    form: Form,
    dq: Tensor | None,
) -> Iterator[Tensor]:
    """Add the part of a prefix of all rows to ``dq``, laid out (B, T, H, D), in place; return its
    own gradients."""
    by = _prefix_by_cpp if _covered(q, prefix.prefix_k.shape[1]) else _prefix_by_blocks
    grads = by(do, q, prefix, output, scale, form, dq)
    return (reduce_heads(g, p.shape[0]).to(p.dtype) for g, p in zip(grads, prefix))


def _prefix_by_cpp(
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
    (pk, pv), shape = prefix, (q.shape[1], *prefix.prefix_k.shape[1:])
    dpk, dpv = q.new_empty(2, *shape, dtype=torch.float32)
    do, o = with_rows(do), with_rows(output.o)
    kind = (form.form == "relu", form.composition == "gated")
    small = pk.detach().float(), pv.detach().float()
    cpp.prefix_backward_(dq, dpk, dpv, do, q, *small, o, output.lse, scale, *kind)
    return dpk, dpv


def _prefix_by_blocks(
    do: Tensor,
    q: Tensor,
    prefix: Prefix,
    output: AttentionOutput,
    scale: float,
    form: Form,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same by the library's GEMMs, in blocks of rows that stay in cache."""
    (o, lse, _, _), heads, length = output, q.shape[1], prefix.prefix_k.shape[1]
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
    """Add the part of a block of rows (q, do, o) to the prefix's gradients; return the gradient of
    its scores."""
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
