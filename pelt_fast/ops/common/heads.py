"""Tensors of attention heads: their layout, grouped heads, and the masks of their scores."""

import torch
from torch import Tensor
from torch.nn import functional as F

MASK_ALIGNMENT = 16  # elements: where rows of a mask begin for the GPU's kernels


def heads_last(x: Tensor) -> Tensor:
    """x (B, H, T, D) laid out in memory as (B, T, H, D), as models store it; x itself if it has
    that layout."""
    rows = x.transpose(1, 2)
    return x if rows.is_contiguous() else rows.contiguous().transpose(1, 2)


def heads_last_empty(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape (B, H, T, D) in that layout."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)


def no_rng(q: Tensor, seed: Tensor | None) -> Tensor:
    """The dropout state if no library kernel made one: zeros, or empty without dropout. The masks
    then come from ``seed`` alone."""
    return torch.zeros(0 if seed is None else 2, dtype=torch.int64, device=q.device)


def expand_heads(kv: Tensor, heads: int) -> Tensor:
    """(..., Hkv, S, D) -> (..., H, S, D), each head repeated for its group of queries."""
    if kv.shape[-3] == heads:
        return kv
    return kv.repeat_interleave(heads // kv.shape[-3], dim=-3)


def reduce_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """The transpose of :func:`expand_heads`."""
    if grad.shape[-3] == kv_heads:
        return grad
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


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to the scores: 0 for a visible key, else -inf."""
    return torch.where(mask, mask.new_zeros((), dtype=dtype), float("-inf"))


def aligned(mask: Tensor) -> Tensor:
    """A copy of a mask (.., S) whose rows begin at multiples of MASK_ALIGNMENT elements."""
    keys = mask.shape[-1]
    return F.pad(mask, (0, -keys % MASK_ALIGNMENT))[..., :keys]


def kernel_mask(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, bool]:
    """The mask (B or 1, H or 1, T, S) and the causal flag for a library kernel.

    The kernel takes a mask of q's dtype (or ``dtype``) or its causal flag, not both. Its causal
    mask is aligned top left.
    """
    queries, keys, dtype = q.shape[2], k.shape[2], dtype or q.dtype
    if mask is None and (not causal or queries == keys):
        return None, causal
    visible = causal_mask(queries, keys, q.device) if causal else None
    if mask is None:
        mask = visible
    elif mask.dtype == torch.bool:
        mask = mask if visible is None else mask & visible
    else:
        mask = mask.to(dtype)
        mask = mask if visible is None else mask.masked_fill(~visible, float("-inf"))
    if mask.dtype == torch.bool:
        mask = additive_mask(mask, dtype)
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(-1, -1, queries, keys), False


def hidden_rows(mask: Tensor) -> Tensor:
    """The rows (B or 1, H or 1, T) of an additive mask that see no key."""
    return (mask == float("-inf")).all(-1)


def softmax_weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), 0 in rows that see no key."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1))
