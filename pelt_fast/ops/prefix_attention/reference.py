"""The specification of attention with P trainable keys and values beside its context.

Shapes   q (B, H, T, D); k, v (B, Hkv, S, D); prefix_k, prefix_v (Hkv, P, D); o (B, H, T, D);
         lse (B, H, T). H is a multiple of Hkv (grouped queries); T and S are independent.
Maths    C = scale q kᵀ + mask,  l_c = logsumexp C;   Z = scale q pkᵀ,  l_p = logsumexp Z
         gated  o = exp(C - l) v + exp(Z - l) pv,     l = logaddexp(l_c, l_p)   (paper eq. 7)
         add    o = exp(C - l_c) v + f(Z) pv,         f = softmax or ReLU (multi-head adapter)
         docs/maths.md#i4 has the derivation.
         Every form scales its scores: W_down = scale Wq pkᵀ contains the constant.
         Causal is bottom-right aligned: query i sees key j when j <= i + S - T. The prefix is
         seen by every query. A row that sees no key has l_c = -inf and weight 0 on the context.
         Dropout acts on the weights that multiply v and pv, after the normalisation.
Saved    q, k, v, o, lse, like attention without a prefix, and prefix_k, prefix_v. ``add`` also
         saves the context's own output.

The seed has two rows: prefix weights (B, H, T, P), context weights (B, H, T, S). The functions
``.._in_blocks`` compute the same, a block of the batch at a time: the scores in memory are those of
one block, for any batch size.

Routed: each row of the batch has the prefix of its own method, or none. The specification runs the
rows of one method after those of another. The prefix weights' mask is as wide as the longest one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common.batch import (
    Mask,
    backward_in_blocks,
    backward_results,
    forward_in_blocks,
    forward_results,
    methods_of,
    output_of,
    prefix_at,
    scores_of,
    whole_batch,
)
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
from pelt_fast.ops.common.dropout import keep_mask, keep_scale
from pelt_fast.ops.common.heads import (
    context_scores,
    expand_heads,
    heads_last,
    no_rng,
    reduce_heads,
    softmax_weights,
)


def _drop_factor(weights: Tensor, drop: Dropout, kind: int, mask: Mask) -> Tensor | float:
    """The dropout factor of the weights (B, H, T, keys): 0 or 1 / (1 - p). ``kind``: the row of the
    seed, 0 of a prefix, 1 of the context."""
    p, seed = drop
    if seed is None:
        return 1.0
    _, heads, queries, keys = weights.shape
    width = keys if kind else mask.width
    size, rows = heads * queries * width, mask.rows
    runs = [(row, row + 1) for row in rows]
    if isinstance(rows, range):
        runs = [(rows.start, rows.stop)]
    parts = [keep_mask(first * size, last * size, p, seed[kind]) for first, last in runs]
    keep = parts[0] if len(parts) == 1 else torch.cat(parts)
    keep = keep.view(len(rows), heads, queries, width)[..., :keys]
    return keep.to(weights.dtype).mul_(keep_scale(p))


def _wide(qkv: QKV, prefix: Prefix, dtype: torch.dtype) -> tuple[QKV, Prefix]:
    """All of them in ``dtype``, with a head of keys and values for each of q's."""
    heads = qkv.q.shape[1]
    q, *kv = (t.to(dtype) for t in qkv)
    k, v = (expand_heads(t, heads) for t in kv)
    return QKV(q, k, v), Prefix(*(expand_heads(t.to(dtype), heads) for t in prefix))


def prefix_attention_forward(
    qkv: QKV,
    prefix: Prefix,
    scores: Scores,
    form: Form,
    drop: Dropout,
    *,
    place: Mask | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, lse (joint when gated, the context's when added), the context's own output (empty
    when gated) and a context kernel's dropout state (none here). Computed in at least fp32.

    ``place``: where the dropout masks of these rows are, by default those of a whole batch.
    """
    place = whole_batch(qkv.q, prefix) if place is None else place
    dtype, (attn_mask, is_causal, scale) = qkv.q.dtype, scores
    (q, k, v), (pk, pv) = _wide(qkv, prefix, torch.promote_types(dtype, torch.float32))
    context = context_scores(q, k, attn_mask, is_causal, scale)
    prefixed = (scale * q) @ pk.transpose(-1, -2)
    lse = torch.logsumexp(context, -1)
    if form.composition == "gated":
        lse = torch.logaddexp(lse, torch.logsumexp(prefixed, -1))
        weights = softmax_weights(prefixed, lse)
    elif form.form == "softmax":
        weights = torch.softmax(prefixed, -1)
    else:
        weights = prefixed.clamp_min(0)
    context = softmax_weights(context, lse)
    context = (context * _drop_factor(context, drop, 1, place)) @ v
    out = context + (weights * _drop_factor(weights, drop, 0, place)) @ pv
    gated = form.composition == "gated"
    kept = absent(qkv.q) if gated else heads_last(context.to(dtype))
    return heads_last(out.to(dtype)), lse, kept, no_rng(q, drop.seed)


def prefix_attention_backward(
    do: Tensor,
    qkv: QKV,
    prefix: Prefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
    *,
    place: Mask | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, d_prefix_k, d_prefix_v; ``needs`` holds a flag for each.

    With the joint o and lse the two parts of a gated head are independent. Each is the softmax
    backward of its own keys, dS = P (dP - rowsum(do o)).
    """
    place = whole_batch(qkv.q, prefix) if place is None else place
    kv_heads, lse, (attn_mask, is_causal, scale) = qkv.k.shape[1], output.lse, scores
    (q, k, v), (pk, pv) = _wide(qkv, prefix, lse.dtype)
    dow = do.to(lse.dtype)
    context = context_scores(q, k, attn_mask, is_causal, scale)
    prefixed = (scale * q) @ pk.transpose(-1, -2)
    prefix_factor = _drop_factor(prefixed, drop, 0, place)
    context_factor = _drop_factor(context, drop, 1, place)
    own = output.o if form.composition == "gated" else output.context_o
    delta = (dow * own.to(lse.dtype)).sum(-1, keepdim=True)
    weights = softmax_weights(context, lse)
    dq, dk, dv = _softmax_backward(dow, QKV(q, k, v), weights, delta, scale, context_factor)
    prefixed_qkv = QKV(q, pk, pv)
    if form.form == "relu":
        parts = _relu_backward(dow, prefixed_qkv, prefixed, scale, prefix_factor)
    else:
        if form.composition == "add":
            lse = torch.logsumexp(prefixed, -1)
            prefix_o = (prefix_factor * softmax_weights(prefixed, lse)) @ pv
            delta = (dow * prefix_o).sum(-1, keepdim=True)
        weights = softmax_weights(prefixed, lse)
        parts = _softmax_backward(dow, prefixed_qkv, weights, delta, scale, prefix_factor)
    grads = (
        heads_last((dq + parts[0]).to(qkv.q.dtype)),
        heads_last(reduce_heads(dk, kv_heads).to(qkv.k.dtype)),
        heads_last(reduce_heads(dv, kv_heads).to(qkv.v.dtype)),
        reduce_heads(parts[1].sum(0), kv_heads).to(prefix.prefix_k.dtype),
        reduce_heads(parts[2].sum(0), kv_heads).to(prefix.prefix_v.dtype),
    )
    return tuple(grad if need else absent(do) for grad, need in zip(grads, needs, strict=True))


def _softmax_backward(
    do: Tensor, qkv: QKV, weights: Tensor, delta: Tensor, scale: float, factor: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of ``(factor weights) v``, with delta = rowsum(do o) of the output."""
    q, k, v = qkv
    d_scores = weights * (factor * (do @ v.transpose(-1, -2)) - delta)
    dv = (factor * weights).transpose(-1, -2) @ do
    return scale * (d_scores @ k), scale * (d_scores.transpose(-1, -2) @ q), dv


def _relu_backward(
    do: Tensor, qkv: QKV, scores: Tensor, scale: float, factor: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of ``(factor relu(scores)) v``."""
    q, k, v = qkv
    d_scores = factor * (do @ v.transpose(-1, -2)) * (scores > 0)
    dv = (factor * scores.clamp_min(0)).transpose(-1, -2) @ do
    return scale * (d_scores @ k), scale * (d_scores.transpose(-1, -2) @ q), dv


def _place(prefix: RoutedPrefix, rows: Tensor, drop: Dropout, whole: Sequence[int]) -> Mask:
    """The place of one method's rows, if a dropout acts."""
    places = [] if drop.seed is None else [whole[row] for row in rows.tolist()]
    return Mask(places, max(prefix.lengths, default=0))


def routed_prefix_forward(
    qkv: QKV,
    prefix: RoutedPrefix,
    scores: Scores,
    form: Form,
    drop: Dropout,
    *,
    place: Mask | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`prefix_attention_forward` of each method's rows with its own prefix; without a prefix,
    attention itself."""
    whole = range(qkv.q.shape[0]) if place is None else place.rows
    results = forward_results(qkv.q, form, drop)
    for rows, keys in methods_of(prefix):
        block, own = QKV(*(t[rows] for t in qkv)), _place(prefix, rows, drop, whole)
        parts = prefix_attention_forward(
            block, prefix_at(prefix, keys), scores_of(scores, rows), form, drop, place=own
        )
        for result, part in zip(results[: 2 if form.composition == "gated" else 3], parts):
            result[rows] = part
    return tuple(results)


def routed_prefix_backward(
    do: Tensor,
    qkv: QKV,
    prefix: RoutedPrefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
    *,
    place: Mask | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`prefix_attention_backward` of each method's rows. A method without rows has gradients
    of zeros."""
    whole = range(do.shape[0]) if place is None else place.rows
    grads = backward_results(do, qkv, prefix, needs)
    for rows, keys in methods_of(prefix):
        block, own = QKV(*(t[rows] for t in qkv)), _place(prefix, rows, drop, whole)
        parts = prefix_attention_backward(
            do[rows], block, prefix_at(prefix, keys), output_of(output, rows),
            scores_of(scores, rows), form, drop, needs, place=own,
        )  # fmt: skip
        for i, (grad, part) in enumerate(zip(grads, parts)):
            if needs[i]:
                grad[rows if i < 3 else (slice(None), keys)] = part
    return tuple(grads)


def prefix_attention_forward_in_blocks(
    qkv: QKV, prefix: Prefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`prefix_attention_forward`, a block of the batch at a time."""
    return forward_in_blocks(prefix_attention_forward, qkv, prefix, scores, form, drop)


def routed_prefix_forward_in_blocks(
    qkv: QKV, prefix: RoutedPrefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`routed_prefix_forward`, a block of the batch at a time."""
    return forward_in_blocks(routed_prefix_forward, qkv, prefix, scores, form, drop)


def prefix_attention_backward_in_blocks(
    do: Tensor,
    qkv: QKV,
    prefix: Prefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`prefix_attention_backward`, a block of the batch at a time."""
    settings = scores, form, drop, needs
    return backward_in_blocks(prefix_attention_backward, do, qkv, prefix, output, *settings)


def routed_prefix_backward_in_blocks(
    do: Tensor,
    qkv: QKV,
    prefix: RoutedPrefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`routed_prefix_backward`, a block of the batch at a time."""
    settings = scores, form, drop, needs
    return backward_in_blocks(routed_prefix_backward, do, qkv, prefix, output, *settings)
