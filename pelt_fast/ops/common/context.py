"""The attention of a context on torch's CPU flash kernel, with its log-sum-exp.

Shapes are those of prefix attention's ``reference``. The kernel's backward gets any o and lse that
belong together; with the merged ones it returns the exact gradients of a context beside a prefix.
"""

import torch
from torch import Tensor

from .bundles import QKV, Scores
from .heads import additive_mask, heads_last, heads_last_empty

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def with_rows(t: Tensor) -> Tensor:
    """t with its last dim contiguous: torch's CPU flash kernel assumes this without a check."""
    return t if t.stride(-1) == 1 else t.contiguous()


def uses_flash(q: Tensor, dropout_p: float) -> bool:
    """Whether the context, if there is one, can run on torch's CPU flash kernel."""
    return q.device.type == "cpu" and dropout_p == 0 and q.numel() > 0


def context_attention(qkv: QKV, scores: Scores) -> tuple[Tensor, Tensor]:
    """o, laid out (B, T, H, D), and lse of the context, -inf for rows that see no key."""
    q, k, v = qkv
    if not k.numel():
        wide = torch.promote_types(q.dtype, torch.float32)
        return heads_last_empty(q).zero_(), q.new_full(q.shape[:-1], -torch.inf, dtype=wide)
    mask, causal, hidden = additive_mask(q, k, scores.attn_mask, scores.is_causal)
    o, lse = flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scores.scale)
    o, lse = heads_last(o), lse.contiguous()
    if hidden is not None:
        lse.masked_fill_(hidden, float("-inf"))
    return o, lse


def context_gradients(
    do: Tensor, qkv: QKV, o: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, ...]:
    """dq, dk, dv of the context, in the memory layout of the model. lse is -inf in a row that sees
    no key, neither of the context nor of a prefix."""
    q, k, v = qkv
    if not k.numel():
        return tuple(heads_last_empty(like).zero_() for like in qkv)
    mask, causal, hidden = additive_mask(q, k, scores.attn_mask, scores.is_causal)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    if hidden is not None:
        # the value that the kernel itself returns for such a row
        lse = lse.masked_fill(lse == float("-inf"), 0)
    parts = _flash_backward(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scores.scale)
    return tuple(map(heads_last, parts))
