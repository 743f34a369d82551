"""The prefix part of attention by the library's GEMMs, for what the C++ code does not take.

Shapes are those of prefix attention's ``reference``. The queries of all batch rows are the rows of
one matrix for each head, worked on in blocks that stay in cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .bundles import QKV, AttentionOutput, Form, Prefix
from .dropout import block_elements
from .heads import expand_heads

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
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


def merge_by_blocks(
    q: Tensor, o: Tensor, lse: Tensor, prefix: Prefix, scale: float, form: Form
) -> Tensor:
    """Merge a prefix of all rows into ``o``, laid out (B, T, H, D), in place; return the lse."""
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


def gradients_by_blocks(
    do: Tensor,
    q: Tensor,
    prefix: Prefix,
    output: AttentionOutput,
    scale: float,
    form: Form,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add the prefix's part to ``dq``, laid out (B, T, H, D), in place; return dpk, dpv
    (H, P, D)."""
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
