"""Rows of a batch of attentions: their share of arguments and results, and work in blocks of rows.

Shapes are those of prefix attention's ``reference``.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .bundles import QKV, AttentionOutput, Dropout, Form, Prefix, RoutedPrefix, Scores, absent
from .dropout import block_elements
from .heads import heads_last_empty, no_rng
from .parts import constant, first_rows


class Mask(NamedTuple):
    """Where the dropout masks of some rows are: the places of the rows in the whole batch, and the
    width of the prefix weights' mask."""

    rows: Sequence[int]
    width: int


def whole_batch(q: Tensor, prefix: Prefix | RoutedPrefix) -> Mask:
    """The masks of a whole batch. With many prefixes they are as wide as the longest."""
    return Mask(range(q.shape[0]), _width(prefix))


def _width(prefix: Prefix | RoutedPrefix) -> int:
    if isinstance(prefix, RoutedPrefix):
        return max(prefix.lengths, default=0)
    return prefix.prefix_k.shape[1]


def methods_of(prefix: RoutedPrefix) -> Iterator[tuple[Tensor, slice]]:
    """The rows of each method that has some, and its keys among all; first the rows of none."""
    first = 0
    for method, length in zip((-1, *range(len(prefix.lengths))), (0, *prefix.lengths)):
        rows = (prefix.routes == method).nonzero().squeeze(1)
        if rows.numel():
            yield rows, slice(first, first + length)
        first += length


def _keys(prefix: RoutedPrefix) -> Tensor:
    """The first key among all and the number of keys: of none, then of each method, int64."""
    pairs = ((0, 0), *zip(first_rows(prefix.lengths), prefix.lengths))
    return constant(pairs, torch.int64, prefix.routes.device)


def keys_of(prefix: RoutedPrefix) -> Tensor:
    """The first key among all and the number of keys of each method (G, 2), int64."""
    return _keys(prefix)[1:]


def spans_of(prefix: RoutedPrefix) -> Tensor:
    """The same of each row's prefix (B, 2), on the device of the routes, which are not read on the
    host."""
    return _keys(prefix).index_select(0, prefix.routes + 1)


def prefix_at(prefix: RoutedPrefix, keys: slice) -> Prefix:
    """The prefix of one method: these keys among all."""
    return Prefix(prefix.prefix_k[:, keys], prefix.prefix_v[:, keys])


def scores_of(scores: Scores, rows: slice | Tensor) -> Scores:
    """The scores' settings for some rows of the batch."""
    mask = scores.attn_mask
    if mask is not None and mask.dim() == 4 and mask.shape[0] > 1:
        return scores._replace(attn_mask=mask[rows])
    return scores


def output_of(output: AttentionOutput, rows: slice | Tensor) -> AttentionOutput:
    """The forward's results for some rows of the batch."""
    o, lse, context_o, rng = output
    own = context_o[rows] if context_o.numel() else context_o
    return AttentionOutput(o[rows], lse[rows], own, rng)


def forward_results(q: Tensor, form: Form, drop: Dropout) -> AttentionOutput:
    """What a forward returns, to be filled by rows of the batch."""
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    context_o = absent(q) if form.composition == "gated" else heads_last_empty(q)
    return AttentionOutput(heads_last_empty(q), lse, context_o, no_rng(q, drop.seed))


def backward_results(
    do: Tensor, qkv: QKV, prefix: Prefix | RoutedPrefix, needs: Sequence[bool]
) -> list[Tensor]:
    """What a backward returns: to be filled by rows of the batch, and zeros for the prefix."""
    grads = [heads_last_empty(t) if need else absent(do) for t, need in zip(qkv, needs)]
    for like, need in zip(prefix[:2], needs[3:]):
        zeros = torch.zeros_like(like, memory_format=torch.contiguous_format)
        grads.append(zeros if need else absent(do))
    return grads


def _blocks(
    qkv: QKV, prefix: Prefix | RoutedPrefix
) -> Iterator[tuple[slice, Prefix | RoutedPrefix, Mask]]:
    """Slices of the batch, each a block of scores; their prefix; and their place in the masks."""
    batch, heads, queries, _ = qkv.q.shape
    width = _width(prefix)
    size = heads * queries * (qkv.k.shape[2] + width)
    step = max(1, block_elements(qkv.q.device) // max(size, 1))
    for first in range(0, batch, step):
        rows, own = slice(first, min(first + step, batch)), prefix
        if isinstance(prefix, RoutedPrefix):
            own = prefix._replace(routes=prefix.routes[rows])
        yield rows, own, Mask(range(rows.start, rows.stop), width)


def forward_in_blocks(
    forward: Callable, qkv: QKV, prefix: Prefix | RoutedPrefix, scores: Scores, form: Form,
    drop: Dropout,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``forward``, a block of the batch at a time."""
    results = forward_results(qkv.q, form, drop)
    for rows, own, place in _blocks(qkv, prefix):
        block = QKV(*(t[rows] for t in qkv))
        parts = forward(block, own, scores_of(scores, rows), form, drop, place=place)
        for result, part in zip(results[: 2 if form.composition == "gated" else 3], parts):
            result[rows] = part
    return tuple(results)


def backward_in_blocks(
    backward: Callable,
    do: Tensor,
    qkv: QKV,
    prefix: Prefix | RoutedPrefix,
    output: AttentionOutput,
    scores: Scores,
    *settings,
) -> tuple[Tensor, ...]:
    """``backward``, a block of the batch at a time; sums d_prefix_k, _v. ``settings``: form,
    dropout, needs."""
    needs = settings[-1]
    grads = backward_results(do, qkv, prefix, needs)
    for rows, own, place in _blocks(qkv, prefix):
        parts = backward(
            do[rows], QKV(*(t[rows] for t in qkv)), own, output_of(output, rows),
            scores_of(scores, rows), *settings, place=place,
        )  # fmt: skip
        for i, (grad, part) in enumerate(zip(grads, parts)):
            if needs[i] and i < 3:
                grad[rows] = part
            elif needs[i]:
                grad += part
    return tuple(grads)
