"""Prefix attention on a GPU: the library's context kernel and one Triton merge, each way.

Shapes and maths are those of ``reference``.
Traffic  in addition to attention without a prefix, in passes of B H T D: q, o_c, o forward 3; q,
         do, o, dq read and dq written backward 5 (P <= 64). Flops (S + P) / S of the attention's.
Saved    q, k, v, o, lse, like attention without a prefix; added forms also save o_c.
Routed   each row's prefix is read where it is; the routes are a tensor, which the host never reads.
         o of a row of none is that of the context kernel, 0 where it sees no key.

Context kernels. Flash runs 16-bit inputs without a mask, causal only if T = S, with grouped heads
unchanged. On architectures of ``config.CONTEXT_KERNELS`` cuDNN's kernel runs 16-bit inputs that it
takes, with and without a mask. The memory-efficient kernel runs the others: a mask, or fp32, with
grouped heads expanded. On a CPU torch's CPU flash kernel runs, and ``cpu`` runs attention dropout.
All take K and V in the model's layout and return the log-sum-exp. Their backward gets the merged o
and the joint lse, and returns the context's exact gradients (docs/maths.md#i4).

Layout: o, the context's own o and every gradient are stored as (B, T, H, D). Two of the backward
kernels need this. The memory-efficient one assumes that the rows of o are H D apart, and ignores
its strides. cuDNN keeps one plan for each layout of q, k and v, and takes the strides of o and do
from the first call.

``rng`` is the dropout state that the kernel returned: (2,) int64, on the CPU or the GPU. A row that
sees no key has lse -inf, and its o must not be read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.kernels import config
from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.ops.common.batch import keys_of, spans_of
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
    MASK_ALIGNMENT,
    aligned,
    expand_heads,
    heads_last,
    heads_last_empty,
    hidden_rows,
    kernel_mask,
    no_rng,
)

aten = torch.ops.aten
LSE_ALIGNMENT = 32  # the memory-efficient backward reads its lse in blocks
CUDNN_HEAD_DIM = 128  # 1 / 16 is the step of its dropout: it runs no dropout here


def _left_to_cpu(q: Tensor, drop: Dropout) -> bool:
    """Whether ``cpu`` runs this: with interpreted kernels there is no flash kernel with dropout."""
    return q.device.type == "cpu" and drop.dropout_p > 0


def prefix_attention_forward(
    qkv: QKV, prefix: Prefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(qkv, prefix, scores, form, drop)


def routed_prefix_forward(
    qkv: QKV, prefix: RoutedPrefix, scores: Scores, form: Form, drop: Dropout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    routing = dict(spans=spans_of(prefix), longest=max(prefix.lengths, default=0))
    return _forward(qkv, Prefix(*prefix[:2]), scores, form, drop, **routing)


def _forward(
    qkv: QKV, prefix: Prefix, scores: Scores, form: Form, drop: Dropout, **routing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``routing``: of the launcher, where each row has its own prefix."""
    q, k, _ = qkv
    if _left_to_cpu(q, drop):
        return NotImplemented
    context_o = context_lse = rng = None
    if q.numel() and k.numel():
        context_o, context_lse, rng = context_forward(*qkv, *scores, drop.dropout_p)
    o = heads_last_empty(q)
    lse = prefix_merge(
        q, *prefix, context_o, context_lse, o, scale=scores.scale, **form._asdict(),
        dropout_p=drop.dropout_p, seed=None if drop.seed is None else drop.seed[0], **routing,
    )  # fmt: skip
    kept = absent(q)
    if form.composition == "add":
        kept = torch.zeros_like(o) if context_o is None else heads_last(context_o)
        if _may_hide_a_row(qkv, scores):
            # in place, because the result of the other form is contiguous
            kept.masked_fill_(lse.unsqueeze(-1) == float("-inf"), 0)
    return o, lse, kept, no_rng(q, drop.seed) if rng is None else rng


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
    return _backward(do, qkv, prefix, output, scores, form, drop, needs)


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
    routing = dict(
        spans=spans_of(prefix), methods=keys_of(prefix), longest=max(prefix.lengths, default=0)
    )
    return _backward(do, qkv, Prefix(*prefix[:2]), output, scores, form, drop, needs, **routing)


def _backward(
    do: Tensor,
    qkv: QKV,
    prefix: Prefix,
    output: AttentionOutput,
    scores: Scores,
    form: Form,
    drop: Dropout,
    needs: Sequence[bool],
    **routing,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, _ = qkv
    if _left_to_cpu(q, drop):
        return NotImplemented
    parts = (None, None, None)
    if any(needs[:3]) and not (q.numel() and k.numel()):
        parts = tuple(heads_last_empty(t).zero_() for t in qkv)
    elif any(needs[:3]):
        own = output.o if form.composition == "gated" else output.context_o
        context = AttentionOutput(own, output.lse, own, output.context_rng)
        every_row_sees = form.composition == "gated" and not routing  # its prefix at least
        parts = context_backward(do, qkv, context, scores, drop.dropout_p, every_row_sees)
    dq = parts[0] if needs[0] else None
    if needs[0] or needs[3] or needs[4]:
        prefix_grads = prefix_merge_bwd(
            do, q, *prefix, output.o, output.lse, dq, scale=scores.scale, **form._asdict(),
            dropout_p=drop.dropout_p, seed=None if drop.seed is None else drop.seed[0], **routing,
        )  # fmt: skip
        parts = (*parts, *prefix_grads)
    parts = (*parts, *[None] * (5 - len(parts)))
    return tuple(part if need else absent(do) for part, need in zip(parts, needs, strict=True))


def _may_hide_a_row(qkv: QKV, scores: Scores) -> bool:
    """Whether a row of the context may see no key."""
    queries, keys = qkv.q.shape[2], qkv.k.shape[2]
    return scores.attn_mask is not None or not keys or (scores.is_causal and queries > keys)


def kernel_for(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, p: float) -> str:
    """The name of the library kernel that takes this context."""
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype == torch.float32:
        return "efficient"
    kernel = config.context_kernel(q.device)
    if kernel == "cudnn" and _cudnn_takes(q, k, p):
        return "cudnn"
    masked = mask is not None or (causal and q.shape[2] != k.shape[2])
    return "efficient" if masked or kernel == "efficient" else "flash"


def _cudnn_takes(q: Tensor, k: Tensor, p: float) -> bool:
    """Torch's own conditions for cuDNN, and q in the layout of o. cuDNN makes a plan for every new
    shape; with a decoder's cache that would be one plan for each token."""
    return (
        p == 0
        and q.shape[2] > 1
        and q.shape[-1] <= CUDNN_HEAD_DIM
        and k.shape[2] > 1
        and q.stride(1) <= q.stride(2)
        and (
            not torch.are_deterministic_algorithms_enabled()
            or torch.is_deterministic_algorithms_warn_only_enabled()
        )
    )


def context_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return o (B, H, T, D), lse (B, H, T) and rng (None without dropout)."""
    kernel = kernel_for(q, k, mask, causal, p)
    rng = None
    if kernel == "flash":
        o, lse, *_, state, _, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, p, causal, False, scale=scale
        )
        return o, lse, state.view(torch.int64) if p > 0 else None
    bias, causal = kernel_mask(q, k, mask, causal)
    if kernel == "cudnn":
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, True, 0.0, causal, False, scale=scale
        )
        lse = lse[..., 0]
    elif kernel == "cpu":
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
        lse = lse.contiguous()
    else:
        k, v = (expand_heads(t, q.shape[1]) for t in (k, v))
        o, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, k, v, _aligned(bias, q), True, p, causal, scale=scale
        )
        lse = lse[..., : q.shape[2]]
        rng = torch.stack([seed, offset]) if p > 0 else None
    if bias is not None:
        lse.masked_fill_(hidden_rows(bias), float("-inf"))
    return o, lse, rng


def context_backward(
    do: Tensor,
    qkv: QKV,
    output: AttentionOutput,
    scores: Scores,
    p: float,
    every_row_sees: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of the context, in the memory layout of the model, from o and lse
    (B, H, T), which may be the merged ones. ``every_row_sees``: lse is finite in every row."""
    (q, k, v), (o, lse, _, rng), (mask, causal, scale) = qkv, output, scores
    kernel, queries, keys = kernel_for(q, k, mask, causal, p), q.shape[2], k.shape[2]
    if p == 0:
        rng = q.new_empty(0, dtype=torch.int64)  # never read
    seed, offset = rng if p > 0 else (rng, rng)
    o = heads_last(o)
    if kernel == "flash":
        grads = aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse, None, None, queries, keys, p, causal, rng.view(torch.uint64),
            offset.view(torch.uint64), scale=scale,
        )  # fmt: skip
        return tuple(heads_last(grad) for grad in grads)
    bias, causal = kernel_mask(q, k, mask, causal)
    if bias is not None and not every_row_sees:
        # a row that sees no key: with any finite lse its weight is exp(-inf) = 0
        lse = lse.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0.0)
    if kernel == "cudnn":
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            heads_last(do), q, k, v, o, lse.unsqueeze(-1), seed, offset, bias, None, None,
            queries, keys, 0.0, causal, scale=scale,
        )  # fmt: skip
    elif kernel == "cpu":
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    else:
        wide = (expand_heads(t, q.shape[1]) for t in (k, v))
        dq, *grads = aten._scaled_dot_product_efficient_attention_backward(
            do, q, *wide, _aligned(bias, q), o,
            F.pad(lse, (0, -queries % LSE_ALIGNMENT), value=float("inf")),
            seed, offset, p, [True, True, True, False], causal, scale=scale,
        )  # fmt: skip
        grads = (dq, *(_reduced(grad, k.shape[1]) for grad in grads[:2]))
    return tuple(heads_last(grad) for grad in grads)


def _reduced(grad: Tensor, kv_heads: int) -> Tensor:
    """``reduce_heads`` of a gradient in the layout (B, S, H, D); the sum has the same layout."""
    if grad.shape[1] == kv_heads:
        return grad
    rows = grad.transpose(1, 2).unflatten(2, (kv_heads, -1))
    return rows.sum(3).transpose(1, 2)


def _aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask (.., T, S) for every head; its rows are aligned as the kernel needs."""
    if bias is None:
        return None
    *strides, step = bias.stride()
    if step != 1 or any(n % MASK_ALIGNMENT for n in (*strides, bias.storage_offset())):
        bias = aligned(bias)
    return bias.expand(*q.shape[:2], -1, -1)
