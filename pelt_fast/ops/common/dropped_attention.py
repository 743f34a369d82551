"""Attention with dropout on its weights, over a context and a prefix, on a CPU.

Shapes, maths and what is saved are those of prefix attention's ``reference``; the scores are fp32.
The products are the library's. What is between them, softmax, mask and their gradients, is one pass
of C++ over the scores (csrc/cpu/attention_weights.cpp).
Traffic  of the scores (B, H, T, S + P), in fp32: written by a product, read and written by the
         pass, read by the next product. Backward the same of scores and their gradients. They are
         made for some heads of one row of the batch at a time, few enough to stay in cache.
Flops    forward 4 D a score; backward 10 D, because the scores are computed again.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .batch import backward_results, forward_results, whole_batch
from .bundles import QKV, AttentionOutput, Dropout, Form, Prefix, RoutedPrefix, Scores
from .dropout import block_elements, cpp_mask
from .heads import additive_mask, expand_heads, reduce_heads
from .parts import first_rows
from .passes import DTYPES, cpp


class _Piece(NamedTuple):
    """Some heads of one row of the batch, in fp32: q (h, T, D), k, v (h, S, D), the prefix's
    (h, P, D)."""

    row: int
    heads: slice  # of q
    groups: slice  # the same among the heads of k and v
    keys: slice  # of the row's prefix among all
    qkv: QKV
    prefix: Prefix
    settings: tuple  # of the C++ pass

    @property
    def own(self) -> tuple[int, slice]:
        """Its place in a tensor (B, H, ...)."""
        return self.row, self.heads

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """q kᵀ of the context (h, T, S) and of the prefix (h, T, P)."""
        return _by_keys(self.qkv.q, self.qkv.k), _by_keys(self.qkv.q, self.prefix.prefix_k)


def takes(q: Tensor) -> bool:
    """Whether the C++ pass takes attention of q."""
    fits = q.device.type == "cpu" and q.dtype in DTYPES and q.numel() > 0
    return fits and native.why_missing() is None


def forward(
    qkv: QKV, prefix: Prefix | RoutedPrefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.prefix_attention_forward`` returns, or its routed form."""
    results = forward_results(qkv.q, form, drop)
    for piece in _pieces(qkv, prefix, scores, form, drop):
        context, prefixed = piece.scores
        cpp.attention_weights_(context, prefixed, results.lse[piece.own], *piece.settings)
        o = torch.bmm(context, piece.qkv.v)
        if form.composition == "add":
            results.context_o[piece.own] = o
        results.o[piece.own] = o.baddbmm_(prefixed, piece.prefix.prefix_v)
    return tuple(results)


def backward(
    do: Tensor,
    qkv: QKV,
    prefix: Prefix | RoutedPrefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.prefix_attention_backward`` returns, or its routed form."""
    grads = backward_results(do, qkv, prefix, needs)
    own = output.o if form.composition == "gated" else output.context_o
    delta = (do.float() * own.float()).sum(-1).contiguous()
    sums = [delta.new_zeros(qkv.q.shape[1], *p.shape[1:]) for p in prefix[:2]]
    for piece in _pieces(qkv, prefix, scores, form, drop):
        outer = do[piece.own].float()
        weights = piece.scores
        d_scores = _by_keys(outer, piece.qkv.v), _by_keys(outer, piece.prefix.prefix_v)
        rows = output.lse[piece.own], delta[piece.own]
        cpp.attention_weights_backward_(*weights, *d_scores, *rows, *piece.settings)
        _add(grads, sums, piece, outer, weights, d_scores, needs)
    for grad, total, need in zip(grads[3:], sums, needs[3:]):
        if need:
            grad.copy_(reduce_heads(total, grad.shape[0]))
    return tuple(grads)


def _add(
    grads: list[Tensor],
    sums: list[Tensor],
    piece: _Piece,
    outer: Tensor,
    weights: tuple[Tensor, Tensor],
    d_scores: tuple[Tensor, Tensor],
    needs: Sequence[bool],
) -> None:
    """The gradients of a piece: written to its place, or added to the sums of the prefix."""
    q, k, _ = piece.qkv
    context, prefixed = d_scores
    if needs[0]:
        grads[0][piece.own] = torch.bmm(context, k).baddbmm_(prefixed, piece.prefix.prefix_k)
    for i, (left, right) in enumerate(((context, q), (weights[0], outer)), 1):
        if needs[i]:
            heads = piece.groups.stop - piece.groups.start
            grads[i][piece.row, piece.groups] = reduce_heads(_by_queries(left, right), heads)
    for total, left, right, need in zip(sums, (prefixed, weights[1]), (q, outer), needs[3:]):
        if need:
            total[piece.heads, piece.keys] += _by_queries(left, right)


def _by_keys(rows: Tensor, keys: Tensor) -> Tensor:
    """(h, T, D) x (h, S, D) -> (h, T, S)"""
    return torch.bmm(rows, keys.transpose(1, 2))


def _by_queries(scores: Tensor, rows: Tensor) -> Tensor:
    """(h, T, S) x (h, T, D) -> (h, S, D)"""
    return torch.bmm(scores.transpose(1, 2), rows)


def _pieces(
    qkv: QKV, prefix: Prefix | RoutedPrefix, scores: Scores, form: Form, drop: Dropout
) -> Iterator[_Piece]:
    """The batch, some heads of a row at a time; a group of heads stays together."""
    (batch, heads, queries, _), width = qkv.q.shape, whole_batch(qkv.q, prefix).width
    group = heads // qkv.k.shape[1]
    size = group * queries * (qkv.k.shape[2] + width)
    step = group * max(1, block_elements(qkv.q.device) // max(size, 1))
    mask, causal = _mask(qkv, scores)
    own = Prefix(*(_wide(p, heads) for p in prefix[:2]))
    kind = scores.scale, form.form == "relu", form.composition == "gated"
    drawn = cpp_mask(drop.dropout_p, drop.seed)
    for row, keys in enumerate(_keys_of_rows(prefix, batch)):
        for first in range(0, heads, step):
            some = slice(first, min(first + step, heads))
            groups = slice(some.start // group, some.stop // group)
            k, v = (_wide(t[row, groups], some.stop - some.start) for t in qkv[1:])
            place = (row * heads + first) * queries, width
            seen = None if mask is None else mask[row, some]
            yield _Piece(
                row, some, groups, keys, QKV(qkv.q[row, some].float(), k, v),
                Prefix(*(p[some, keys] for p in own)), (seen, causal, *kind, *drawn, *place),
            )  # fmt: skip


def _wide(kv: Tensor, heads: int) -> Tensor:
    """(Hkv, S, D) in fp32 with a head for each of q's."""
    return expand_heads(kv.detach().float(), heads)


def _keys_of_rows(prefix: Prefix | RoutedPrefix, batch: int) -> list[slice]:
    """The keys of each row's prefix among all; an empty slice of none."""
    if isinstance(prefix, Prefix):
        return [slice(0, prefix.prefix_k.shape[1])] * batch
    starts = (*first_rows(prefix.lengths), 0)
    lengths = (*prefix.lengths, 0)  # -1, none, is the last
    return [slice(starts[m], starts[m] + lengths[m]) for m in prefix.routes.tolist()]


def _mask(qkv: QKV, scores: Scores) -> tuple[Tensor | None, bool]:
    """The additive mask (B, H, T, S), and the causal flag for T = S."""
    q, k, _ = qkv
    mask, causal, _ = additive_mask(q, k, scores.attn_mask, scores.is_causal, torch.float32)
    if mask is None:
        return None, causal
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    return mask.expand(*q.shape[:3], k.shape[2]), causal
