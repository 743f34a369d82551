"""Heads: a modification of the attention heads by P trainable keys and values (identity I4).

Shapes   q (B, H, T, D); k, v (B, Hkv, S, D); prefix_k, prefix_v (Hkv, P, D); o (B, H, T, D);
         lse (B, H, T). H is a multiple of Hkv (grouped queries); T and S are independent.
Maths    C = scale q kᵀ + mask,  l_c = logsumexp C;   Z = scale q pkᵀ,  l_p = logsumexp Z
         gated  o = exp(C - l) v + exp(Z - l) pv,     l = logaddexp(l_c, l_p)   (paper eq. 7)
         add    o = exp(C - l_c) v + f(Z) pv,         f = softmax or ReLU (multi-head adapter)
         Every form scales its scores: W_down = scale Wq pkᵀ takes the constant up.
         Causal is bottom-right aligned: query i sees key j when j <= i + S - T. The prefix is
         seen by every query. A row that sees no key has l_c = -inf and weight 0 on the context.
         Dropout acts on the weights that multiply v and pv, after the normalisation.
Saved    q, k, v, prefix_k, prefix_v, o, lse: what attention without a prefix saves. ``add`` also
         keeps the context's own output.

``seed`` has two rows: prefix weights (B, H, T, P), context weights (B, H, T, S).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .low_rank import empty_like_nothing
from .philox import keep_mask, keep_scale


def _drop_factor(
    weights: Tensor, p: float, seed: Tensor | None, row: int, first_batch: int
) -> Tensor | float:
    """What the weights (B, H, T, keys) are multiplied by: 0 or 1 / (1 - p)."""
    if seed is None:
        return 1.0
    start = first_batch * weights[0].numel()
    keep = keep_mask(start, start + weights.numel(), p, seed[row])
    return keep.view(weights.shape).to(weights.dtype).mul_(keep_scale(p))


def heads_last(x: Tensor) -> Tensor:
    """The same (B, H, T, D) laid out in memory as (B, T, H, D), as models hold it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def heads_last_empty(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape (B, H, T, D) in that layout."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def no_rng(q: Tensor, seed: Tensor | None) -> Tensor:
    """What stands for the dropout state of a library's context kernel where none ran: its masks
    come from ``seed`` alone."""
    return torch.zeros(0 if seed is None else 2, dtype=torch.int64, device=q.device)


def expand_heads(kv: Tensor, heads: int) -> Tensor:
    """(..., Hkv, S, D) -> (..., H, S, D), each head repeated for its group of queries."""
    if kv.shape[-3] == heads:
        return kv
    return kv.repeat_interleave(heads // kv.shape[-3], dim=-3)


def reduce_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """The transpose of :func:`expand_heads`."""
    *batch, heads, length, dim = grad.shape
    return grad.reshape(*batch, kv_heads, heads // kv_heads, length, dim).sum(-3)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Bottom-right aligned: bool (T, S), True is visible."""
    ones = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return ones.tril(keys - queries)


def context_scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """C (B, H, T, S), -inf where a key is hidden. ``mask`` is bool (True visible) or additive."""
    scores = (scale * q) @ k.transpose(-1, -2)
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.to(scores.dtype)
    if causal:
        visible = causal_mask(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def softmax_weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see nothing."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1))


def prefix_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    form: str,
    composition: str,
    dropout_p: float,
    seed: Tensor | None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return o, lse (joint when gated, the context's when added), the context's own output (empty
    when gated) and a context kernel's dropout state (none here). Computed in at least fp32.

    ``first_batch``: where q's batch starts in the larger one the dropout masks are defined on.
    """
    heads, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    qw = q.to(wide)
    keys, values = expand_heads(k.to(wide), heads), expand_heads(v.to(wide), heads)
    pk, pv = expand_heads(prefix_k.to(wide), heads), expand_heads(prefix_v.to(wide), heads)

    scores = context_scores(qw, keys, attn_mask, is_causal, scale)
    prefix = (scale * qw) @ pk.transpose(-1, -2)
    lse = torch.logsumexp(scores, -1)
    if composition == "gated":
        lse = torch.logaddexp(lse, torch.logsumexp(prefix, -1))
        weights = softmax_weights(prefix, lse)
    elif form == "softmax":
        weights = torch.softmax(prefix, -1)
    else:
        weights = prefix.clamp_min(0)
    context = softmax_weights(scores, lse)
    context = (context * _drop_factor(context, dropout_p, seed, 1, first_batch)) @ values
    out = context + (weights * _drop_factor(weights, dropout_p, seed, 0, first_batch)) @ pv
    kept = empty_like_nothing(q) if composition == "gated" else heads_last(context.to(q.dtype))
    return heads_last(out.to(q.dtype)), lse, kept, no_rng(q, seed)


def _softmax_backward(do, q, k, v, scores, lse, delta, scale, factor):
    """dq, dk, dv of ``(factor exp(scores - lse)) v``, with delta = rowsum(do o) of the output."""
    weights = softmax_weights(scores, lse)
    d_scores = weights * (factor * (do @ v.transpose(-1, -2)) - delta)
    dv = (factor * weights).transpose(-1, -2) @ do
    return scale * (d_scores @ k), scale * (d_scores.transpose(-1, -2) @ q), dv


def _relu_backward(do, q, k, v, scores, scale, factor):
    """dq, dk, dv of ``(factor relu(scores)) v``."""
    d_scores = factor * (do @ v.transpose(-1, -2)) * (scores > 0)
    dv = (factor * scores.clamp_min(0)).transpose(-1, -2) @ do
    return scale * (d_scores @ k), scale * (d_scores.transpose(-1, -2) @ q), dv


def prefix_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    o: Tensor,
    lse: Tensor,
    context_o: Tensor,
    context_rng: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    form: str,
    composition: str,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv, d_prefix_k, d_prefix_v; ``needs`` holds a flag for each.

    With the joint o and lse the two parts of a gated head separate: each is the softmax backward
    of its own keys, dS = P (dP - rowsum(do o)).
    """
    heads, kv_heads, wide = q.shape[1], k.shape[1], lse.dtype
    qw, dow = q.to(wide), do.to(wide)
    keys, values = expand_heads(k.to(wide), heads), expand_heads(v.to(wide), heads)
    pk, pv = expand_heads(prefix_k.to(wide), heads), expand_heads(prefix_v.to(wide), heads)
    scores = context_scores(qw, keys, attn_mask, is_causal, scale)
    prefix = (scale * qw) @ pk.transpose(-1, -2)

    prefix_factor = _drop_factor(prefix, dropout_p, seed, 0, first_batch)
    context_factor = _drop_factor(scores, dropout_p, seed, 1, first_batch)
    own = o if composition == "gated" else context_o
    delta = (dow * own.to(wide)).sum(-1, keepdim=True)
    dq, dk, dv = _softmax_backward(dow, qw, keys, values, scores, lse, delta, scale, context_factor)
    if form == "relu":
        parts = _relu_backward(dow, qw, pk, pv, prefix, scale, prefix_factor)
    else:
        if composition == "add":
            lse = torch.logsumexp(prefix, -1)
            prefix_o = (prefix_factor * softmax_weights(prefix, lse)) @ pv
            delta = (dow * prefix_o).sum(-1, keepdim=True)
        parts = _softmax_backward(dow, qw, pk, pv, prefix, lse, delta, scale, prefix_factor)
    grads = (
        heads_last((dq + parts[0]).to(q.dtype)),
        heads_last(reduce_heads(dk, kv_heads).to(k.dtype)),
        heads_last(reduce_heads(dv, kv_heads).to(v.dtype)),
        reduce_heads(parts[1].sum(0), kv_heads).to(prefix_k.dtype),
        reduce_heads(parts[2].sum(0), kv_heads).to(prefix_v.dtype),
    )
    return tuple(
        grad if need else empty_like_nothing(do) for grad, need in zip(grads, needs, strict=True)
    )
