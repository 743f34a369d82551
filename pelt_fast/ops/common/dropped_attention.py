"""Attention with dropout on its weights, over a context and a prefix, on a CPU.

Shapes, maths and what is saved are those of prefix attention's ``reference``; the scores are fp32.
The products are the library's. What is between them, softmax, mask and their gradients, is one pass
of C++ over the scores (csrc/cpu/attention_weights.cpp).
Traffic  of the scores (B, H, T, S + P), in fp32: written by a product, read and written by the
         pass, read by the next product. Backward the same of scores and their gradients. They are
         made in pieces that stay in cache: some heads of a row of the batch, or some whole rows.
Flops    forward 4 D a score; backward 10 D, because the scores are computed again.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import backward_results, forward_results, whole_batch
from .bundles import QKV, AttentionOutput, Dropout, Form, Prefix, RoutedPrefix, Scores
from .dropout import block_elements, cpp_mask
from .heads import expand_heads, kernel_mask, reduce_heads
from .parts import first_rows
from .passes import cpp


class _Piece(NamedTuple):
    """Some heads of a row of the batch, or all heads of some rows."""

    rows: slice
    heads: slice  # of q
    groups: slice  # the same among the heads of k and v
    keys: slice  # of these rows' prefix among all

    def of(self, t: Tensor) -> Tensor:
        """Its n heads (n, ...) of a tensor (B, H, ...) of q's heads, in fp32."""
        return t[self.rows, self.heads].flatten(0, 1).float()

    def of_keys(self, t: Tensor) -> Tensor:
        """The same of a tensor (B, Hkv, ...)."""
        wide = expand_heads(t[self.rows, self.groups], self.heads.stop - self.heads.start)
        return wide.flatten(0, 1).float()

    def of_prefix(self, t: Tensor) -> Tensor:
        """The same of a prefix (H, P, D)."""
        rows = self.rows.stop - self.rows.start
        return t[self.heads, self.keys].expand(rows, -1, -1, -1).flatten(0, 1)

    def by_row(self, part: Tensor) -> Tensor:
        """(n, ...) as (rows, heads, ...)"""
        return part.unflatten(0, (self.rows.stop - self.rows.start, -1))


def forward(
    qkv: QKV, prefix: Prefix | RoutedPrefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.prefix_attention_forward`` returns, or its routed form."""
    results, own = forward_results(qkv.q, form, drop), _wide(prefix, qkv.q.shape[1])
    settings = _Settings(qkv, prefix, scores, form, drop)
    for piece in _pieces(qkv, prefix):
        q, k, v = piece.of(qkv.q), piece.of_keys(qkv.k), piece.of_keys(qkv.v)
        prefix_k, prefix_v = map(piece.of_prefix, own)
        context, prefixed = _by_keys(q, k), _by_keys(q, prefix_k)
        cpp.attention_weights_(context, prefixed, piece.of(results.lse), *settings.of(piece))
        o = torch.bmm(context, v)
        if form.composition == "add":
            results.context_o[piece.rows, piece.heads] = piece.by_row(o)
        results.o[piece.rows, piece.heads] = piece.by_row(o.baddbmm_(prefixed, prefix_v))
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
    grads, heads = backward_results(do, qkv, prefix, needs), qkv.q.shape[1]
    merged = output.o if form.composition == "gated" else output.context_o
    delta = (do.float() * merged.float()).sum(-1).contiguous()
    own, settings = _wide(prefix, heads), _Settings(qkv, prefix, scores, form, drop)
    sums = [torch.zeros_like(p) for p in own]
    for piece in _pieces(qkv, prefix):
        q, outer, k, v = piece.of(qkv.q), piece.of(do), piece.of_keys(qkv.k), piece.of_keys(qkv.v)
        prefix_k, prefix_v = map(piece.of_prefix, own)
        weights = _by_keys(q, k), _by_keys(q, prefix_k)
        d_scores = _by_keys(outer, v), _by_keys(outer, prefix_v)
        rows = piece.of(output.lse), piece.of(delta)
        cpp.attention_weights_backward_(*weights, *d_scores, *rows, *settings.of(piece))
        if needs[0]:
            dq = torch.bmm(d_scores[0], k).baddbmm_(d_scores[1], prefix_k)
            grads[0][piece.rows, piece.heads] = piece.by_row(dq)
        for i, (left, right) in enumerate(((d_scores[0], q), (weights[0], outer)), 1):
            if needs[i]:
                place = grads[i][piece.rows, piece.groups]
                part = piece.by_row(_by_queries(left, right))
                place.copy_(reduce_heads(part, place.shape[1]))
        for i, (left, right) in enumerate(((d_scores[1], q), (weights[1], outer))):
            if needs[3 + i]:
                part = piece.by_row(_by_queries(left, right))
                sums[i][piece.heads, piece.keys] += part.sum(0)
    for grad, total, need in zip(grads[3:], sums, needs[3:]):
        if need:
            grad.copy_(reduce_heads(total, grad.shape[0]))
    return tuple(grads)


def _by_keys(rows: Tensor, keys: Tensor) -> Tensor:
    """(n, T, D) x (n, S, D) -> (n, T, S)"""
    return torch.bmm(rows, keys.transpose(1, 2))


def _by_queries(scores: Tensor, rows: Tensor) -> Tensor:
    """(n, T, S) x (n, T, D) -> (n, S, D)"""
    return torch.bmm(scores.transpose(1, 2), rows)


def _wide(prefix: Prefix | RoutedPrefix, heads: int) -> list[Tensor]:
    """Keys and values of the prefix in fp32 with a head for each of q's."""
    return [expand_heads(p.detach().float(), heads) for p in prefix[:2]]


def _pieces(qkv: QKV, prefix: Prefix | RoutedPrefix) -> Iterator[_Piece]:
    """The batch in pieces; a group of heads stays together, and rows of one prefix alone."""
    batch, heads, queries, _ = qkv.q.shape
    group = heads // qkv.k.shape[1]
    size = queries * (qkv.k.shape[2] + whole_batch(qkv.q, prefix).width)
    most = max(1, block_elements(qkv.q.device) // max(size, 1))  # heads
    spans = _keys_of_rows(prefix, batch)
    step = max(1, most // heads) if isinstance(prefix, Prefix) else 1
    some = heads if step > 1 else min(heads, group * max(1, most // group))
    for row in range(0, batch, step):
        rows = slice(row, min(row + step, batch))
        for first in range(0, heads, some):
            last = min(first + some, heads)
            yield _Piece(rows, slice(first, last), slice(first // group, last // group), spans[row])


def _keys_of_rows(prefix: Prefix | RoutedPrefix, batch: int) -> list[slice]:
    """The keys of each row's prefix among all; an empty slice of none."""
    if isinstance(prefix, Prefix):
        return [slice(0, prefix.prefix_k.shape[1])] * batch
    starts, lengths = (*first_rows(prefix.lengths), 0), (*prefix.lengths, 0)  # of none: the last
    return [slice(starts[m], starts[m] + lengths[m]) for m in prefix.routes.tolist()]


class _Settings:
    """What the C++ pass gets beside the scores."""

    def __init__(self, qkv: QKV, prefix, scores: Scores, form: Form, drop: Dropout):
        q, k, _ = qkv
        mask, causal = kernel_mask(q, k, scores.attn_mask, scores.is_causal, torch.float32)
        if mask is not None:
            mask = mask if mask.stride(-1) == 1 else mask.contiguous()
            mask = mask.expand(*q.shape[:3], k.shape[2])
        self.mask, self.shape, self.width = mask, q.shape, whole_batch(q, prefix).width
        self.kind = causal, scores.scale, form.form == "relu", form.composition == "gated"
        self.drawn = cpp_mask(drop.dropout_p, drop.seed)

    def of(self, piece: _Piece) -> tuple:
        """Of a piece."""
        _, heads, queries, _ = self.shape
        first = (piece.rows.start * heads + piece.heads.start) * queries
        mask = None if self.mask is None else self.mask[piece.rows, piece.heads]
        return mask, *self.kind, *self.drawn, first, self.width
