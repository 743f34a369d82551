"""Prefix attention as two attentions merged by log-sum-exp (docs/maths.md#i4).

Shapes and maths are those of ``reference``.
The context runs on torch's own flash kernel, unchanged: no concatenation, no wider mask, no copy of
the prefix for each batch row. Its backward kernel gets the merged o and the joint lse, and returns
exact dq, dk, dv. The prefix part runs in C++ (csrc/cpu/prefix.cpp), a prefix of more than
``MAX_PREFIX`` in parts. Without C++, the queries of all batch rows are the rows of one matrix for
each head, in blocks that stay in cache.
Traffic  in addition to attention without a prefix: q, o read and o written forward; q, o, do, dq
         read and dq written backward, for each part. Flops (S + P) / S of the attention's.
Routed   the same of the rows that have a prefix, each with its own P; the methods' keys and values
         are read where they are, and none of a method without rows.

A few queries that no mask restricts, as in a decoder's step, need one call: C++ attends over prefix
and context (csrc/cpu/prefix_few.cpp). A row of no prefix has what the flash kernel makes.
If the flash kernel cannot run (attention dropout), ``dropped_attention`` does; without C++ the
specification, in blocks. Without a context only the prefix part runs.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from pelt_fast.ops.common import dropped_attention
from pelt_fast.ops.common.batch import methods_of, output_of, prefix_at, spans_of
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
from pelt_fast.ops.common.heads import (
    heads_last,
    heads_last_empty,
    hidden_rows,
    kernel_mask,
    no_rng,
    reduce_heads,
)
from pelt_fast.ops.common.passes import covers_rows, cpp
from pelt_fast.ops.common.prefix_blocks import flash, gradients_by_blocks, merge_by_blocks

MAX_PREFIX, MAX_HEAD_DIM = 256, 128  # kMaxPrefix and kColumns of csrc/cpu
FEW_QUERIES, HEAD_DIM_STEP = 8, 16  # kFewQueries and kPad of csrc/cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefix_attention_forward(
    qkv: QKV, prefix: Prefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, gated, scale = qkv.q, form.composition == "gated", scores.scale
    if not _uses_flash(q, drop.dropout_p):
        return _dropped_forward(qkv, prefix, scores, form, drop)
    if gated and _is_step(qkv, prefix, prefix.prefix_k.shape[1], scores):
        return _step(qkv, prefix, scale)
    qkv = QKV(*map(_with_rows, qkv))
    q = qkv.q
    o, lse = _context_attention(qkv, scores)
    context_o, rng = absent(q) if gated else o.clone(), no_rng(q, drop.seed)
    return o, _merge(q, o, lse, prefix, scale, form), context_o, rng


def routed_prefix_forward(
    qkv: QKV, prefix: RoutedPrefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gated, longest = form.composition == "gated", max(prefix.lengths, default=0)
    if not _uses_flash(qkv.q, drop.dropout_p):
        return _dropped_forward(qkv, prefix, scores, form, drop)
    if gated and _is_step(qkv, prefix, longest, scores):
        return _routed_step(qkv, prefix, scores.scale)
    qkv = QKV(*map(_with_rows, qkv))
    q = qkv.q
    o, lse = _context_attention(qkv, scores)
    context_o = absent(q) if gated else o.clone()
    if 0 < longest <= MAX_PREFIX and _covered(q, longest, form):
        _merge_by_cpp(q, o, lse, prefix, scores.scale, form)
    elif longest:
        for rows, keys in methods_of(prefix):
            own = heads_last(o[rows])
            lse[rows] = _merge(
                heads_last(q[rows]), own, lse[rows], prefix_at(prefix, keys), scores.scale, form
            )
            o[rows] = own
    return o, lse, context_o, no_rng(q, drop.seed)


def _dropped_forward(qkv: QKV, *settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    covered = covers_rows(qkv.q)
    return dropped_attention.forward(qkv, *settings) if covered else NotImplemented


def _dropped_backward(do: Tensor, qkv: QKV, *settings) -> tuple[Tensor, ...]:
    covered = covers_rows(qkv.q)
    return dropped_attention.backward(do, qkv, *settings) if covered else NotImplemented


def _covered(q: Tensor, length: int, form: Form) -> bool:
    """Whether C++ takes a prefix of this length beside q, in parts if it is longer than
    ``MAX_PREFIX``. Their sum is exact: each is merged into the output of those before. That of a
    softmax over the prefix alone is not, and 16-bit outputs would be rounded after each part."""
    if not covers_rows(q) or q.shape[-1] > MAX_HEAD_DIM:
        return False
    sums = form.form == "relu" or form.composition == "gated"
    return length <= MAX_PREFIX or (sums and q.dtype is torch.float32)


def _parts(prefix: Prefix | RoutedPrefix) -> list[Prefix | RoutedPrefix]:
    """Parts of the keys that C++ takes at once, of about one length."""
    length = prefix.prefix_k.shape[1]
    if isinstance(prefix, RoutedPrefix) or length <= MAX_PREFIX:
        return [prefix]
    count = -(-length // MAX_PREFIX)
    size = -(-length // (count * HEAD_DIM_STEP)) * HEAD_DIM_STEP
    return [*map(Prefix, prefix.prefix_k.split(size, 1), prefix.prefix_v.split(size, 1))]


def _merge_by_cpp(
    q: Tensor, o: Tensor, lse: Tensor, prefix: Prefix | RoutedPrefix, scale: float, form: Form
) -> None:
    kind, spans = (form.form == "relu", form.composition == "gated"), _spans(prefix)
    for part in _parts(prefix):
        cpp.prefix_merge_(o, lse, q, *_fp32(part), scale, *kind, spans)


def _fp32(prefix: Prefix | RoutedPrefix) -> tuple[Tensor, Tensor]:
    """Keys and values as C++ reads them."""
    return prefix.prefix_k.detach().float(), prefix.prefix_v.detach().float()


def _spans(prefix: Prefix | RoutedPrefix) -> Tensor | None:
    return spans_of(prefix) if isinstance(prefix, RoutedPrefix) else None


def _merge(q: Tensor, o: Tensor, lse: Tensor, prefix: Prefix, scale: float, form: Form) -> Tensor:
    """Merge a prefix of all rows into ``o``, laid out (B, T, H, D), in place; return the lse."""
    length = prefix.prefix_k.shape[1]
    if length == 0:
        return lse
    if _covered(q, length, form):
        _merge_by_cpp(q, o, lse, prefix, scale, form)
        return lse
    return merge_by_blocks(q, o, lse, prefix, scale, form)


def _is_step(qkv: QKV, prefix: Prefix | RoutedPrefix, longest: int, scores: Scores) -> bool:
    """Whether C++ runs prefix and context in one call: a few queries that see every key, as in a
    decoder's step."""
    q, k, v = qkv
    queries, dim = q.shape[2:]
    if queries > FEW_QUERIES or scores.attn_mask is not None or (scores.is_causal and queries > 1):
        return False
    rows = q.stride(3) == k.stride(3) == v.stride(3) == 1 and dim % HEAD_DIM_STEP == 0
    fits = dim <= MAX_HEAD_DIM and 0 < longest <= MAX_PREFIX and k.shape[2] > 0
    small = prefix.prefix_k.stride(2) == prefix.prefix_v.stride(2) == 1
    return rows and fits and small and covers_rows(q)


def prefix_step(
    q: Tensor, k: Tensor, v: Tensor, prefix: Prefix, scores: Scores, form: Form
) -> Callable | None:
    """What runs one query like q over any number of keys without autograd, a mask and dropout,
    checked here once; None if C++ does not take it."""
    qkv, length = QKV(q, k, v), prefix.prefix_k.shape[1]
    one = q.shape[2] == 1 and form.composition == "gated" and _uses_flash(q, 0.0)
    if not one or not _is_step(qkv, prefix, length, scores):
        return None
    prefix, scale = Prefix(*_fp32(prefix)), scores.scale
    return lambda *qkv: _step(QKV(*map(_with_rows, qkv)), prefix, scale)[0]


def _step(
    qkv: QKV, prefix: Prefix | RoutedPrefix, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, nothing = qkv.q, absent(qkv.q)
    o = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    cpp.prefix_few_queries_(o, lse, *qkv, *_fp32(prefix), scale, _spans(prefix))
    return o, lse, nothing, q.new_empty(0, dtype=torch.int64)


def _routed_step(
    qkv: QKV, prefix: RoutedPrefix, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of none, which C++ leaves, run on the kernel of attention without a prefix: runs of
    them, so that no cache is copied."""
    results = _step(qkv, prefix, scale)
    first, lengths = 0, (*prefix.lengths, 0)
    for length, run in groupby(prefix.routes.tolist(), lambda method: lengths[method] > 0):
        rows = slice(first, first + len([*run]))
        if not length:
            parts = _context_attention(QKV(*(t[rows] for t in qkv)), Scores(None, False, scale))
            for result, part in zip(results, parts):
                result[rows] = part
        first = rows.stop
    return results


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
    if not _uses_flash(qkv.q, drop.dropout_p):
        return _dropped_backward(do, qkv, prefix, output, scores, form, drop, needs)
    do, qkv = _with_rows(do), QKV(*map(_with_rows, qkv))
    grads = _of_context(do, qkv, output, scores, form, needs)
    grads[3:] = _of_prefix(do, qkv.q, prefix, output, scores.scale, form, grads[0])
    return _needed(grads, needs, do)


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
    if not _uses_flash(qkv.q, drop.dropout_p):
        return _dropped_backward(do, qkv, prefix, output, scores, form, drop, needs)
    do, qkv = _with_rows(do), QKV(*map(_with_rows, qkv))
    q, grads = qkv.q, _of_context(do, qkv, output, scores, form, needs)
    longest = max(prefix.lengths, default=0)
    if 0 < longest <= MAX_PREFIX and _covered(q, longest, form):
        grads[3:] = _of_prefix(do, q, prefix, output, scores.scale, form, grads[0])
        return _needed(grads, needs, do)
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
    return _needed(grads, needs, do)


def _needed(
    grads: Sequence[Tensor | None], needs: Sequence[bool], do: Tensor
) -> tuple[Tensor, ...]:
    return tuple(grad if need else absent(do) for grad, need in zip(grads, needs, strict=True))


def _of_context(
    do: Tensor, qkv: QKV, output: AttentionOutput, scores: Scores, form: Form, needs: Sequence[bool]
) -> list[Tensor | None]:
    """dq, dk, dv of the context, if they are needed, and places for those of the prefix."""
    if not any(needs[:3]):
        return [None] * 5
    own = output.o if form.composition == "gated" else output.context_o
    parts = _context_gradients(do, qkv, own, output.lse, scores)
    return [*(part if need else None for part, need in zip(parts, needs)), None, None]


def _of_prefix(
    do: Tensor,
    q: Tensor,
    prefix: Prefix | RoutedPrefix,
    output: AttentionOutput,
    scale: float,
    form: Form,
    dq: Tensor | None,
) -> Iterator[Tensor]:
    """Add the prefix's part to ``dq``, laid out (B, T, H, D), in place; return the gradients of the
    keys and values. Many prefixes run in C++ only."""
    covered = isinstance(prefix, RoutedPrefix) or _covered(q, prefix.prefix_k.shape[1], form)
    by = _prefix_by_cpp if covered else gradients_by_blocks
    grads = by(do, q, prefix, output, scale, form, dq)
    if q.shape[1] != prefix.prefix_k.shape[0]:
        grads = (reduce_heads(g, p.shape[0]) for g, p in zip(grads, prefix))
    return (g.to(p.dtype) for g, p in zip(grads, prefix))


def _prefix_by_cpp(
    do: Tensor,
    q: Tensor,
    prefix: Prefix | RoutedPrefix,
    output: AttentionOutput,
    scale: float,
    form: Form,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dpk, dpv (H, P, D), summed over the rows in one fixed order; zeros for a prefix of no row."""
    kind, spans = (form.form == "relu", form.composition == "gated"), _spans(prefix)
    make = q.new_empty if spans is None else q.new_zeros
    do, o = _with_rows(do), _with_rows(output.o)
    grads = []
    for part in _parts(prefix):
        shape = (q.shape[1], *part.prefix_k.shape[1:])
        own = make(shape, dtype=torch.float32), make(shape, dtype=torch.float32)
        cpp.prefix_backward_(dq, *own, do, q, *_fp32(part), o, output.lse, scale, *kind, spans)
        grads.append(own)
    return grads[0] if len(grads) == 1 else tuple(torch.cat(each, 1) for each in zip(*grads))


def _with_rows(t: Tensor) -> Tensor:
    """t with its last dim contiguous: torch's CPU flash kernel assumes this without a check."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _uses_flash(q: Tensor, dropout_p: float) -> bool:
    """Whether the context, if there is one, can run on torch's CPU flash kernel."""
    return q.device.type == "cpu" and dropout_p == 0 and q.numel() > 0


def _context_attention(qkv: QKV, scores: Scores) -> tuple[Tensor, Tensor]:
    """o, laid out (B, T, H, D), and lse of the context, -inf for rows that see no key."""
    q, k, v = qkv
    if not k.numel():
        wide = torch.promote_types(q.dtype, torch.float32)
        return heads_last_empty(q).zero_(), q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    mask, causal = kernel_mask(q, k, scores.attn_mask, scores.is_causal)
    o, lse = flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scores.scale)
    o, lse = heads_last(o), lse.contiguous()
    if mask is not None:  # the kernel returns 0 for a row that sees no key
        lse.masked_fill_(hidden_rows(mask), float("-inf"))
    return o, lse


def _context_gradients(
    do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, ...]:
    """dq, dk, dv of the context, in the memory layout of the model. lse is -inf in a row that sees
    no key, neither of the context nor of a prefix."""
    q, k, v = qkv
    if not k.numel():
        return tuple(heads_last_empty(like).zero_() for like in qkv)
    mask, causal = kernel_mask(q, k, scores.attn_mask, scores.is_causal)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    if mask is not None:
        # the value that the kernel itself returns for such a row
        lse = lse.masked_fill(lse == float("-inf"), 0)
    parts = _flash_backward(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scores.scale)
    return tuple(map(heads_last, parts))
