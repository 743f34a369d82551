"""The public function of prefix attention: arguments are checked, then the op runs."""

import torch
from torch import Tensor

from pelt_fast.ops.common import arguments as check
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import QKV, Form, Prefix, Scores

from .op import attention_with_prefix

FORMS = ("softmax", "relu")
COMPOSITIONS = ("gated", "add")


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    form: str = "softmax",
    composition: str = "gated",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Attention over ``[prefix; context]`` without concatenating them (paper equation 7).

    Args:
        q: queries (B, H, T, D).
        k: keys (B, Hkv, S, D), H a multiple of Hkv.
        v: values (B, Hkv, S, D).
        prefix_k: trainable keys (Hkv, P, D), seen by every query, of q's dtype or wider.
        prefix_v: trainable values (Hkv, P, D).
        attn_mask: the mask of the context alone: (T, S) or broadcastable to (B, H, T, S), bool
            (True is visible) or added to the scores.
        is_causal: whether query i sees only the keys j <= i + S - T (bottom-right aligned).
        scale: the factor of the scores; D ** -0.5 by default.
        form: the function of the prefix's scores, "softmax" or "relu" (multi-head adapter).
        composition: "gated" is prefix tuning, (1 - λ) h + λ Δh; "add" is h + Δh.
        dropout_p: the probability of the dropout on the weights, in [0, 1).
        training: whether the dropout acts.

    Returns:
        The heads (B, H, T, D), laid out in memory as (B, T, H, D).

    Raises:
        TypeError: an argument is no tensor, or of another dtype; the message names it.
        ValueError: an argument has another shape, device or value; the message names it.

    Saved:
        For backward: q, k, v, the output and its log-sum-exp (B, H, T), like attention without a
        prefix, and the prefix. "add" also saves the context's own output.

    Example:
        >>> q, k, v = (torch.randn(2, 4, 7, 8) for _ in range(3))
        >>> prefix_k, prefix_v = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
        >>> prefix_attention(q, k, v, prefix_k, prefix_v, is_causal=True).shape
        torch.Size([2, 4, 7, 8])
    """
    check.activation_tensor("q", q, 4)
    q, k, v = check.cast(q, k, v)
    qkv, prefix = QKV(q, k, v), Prefix(prefix_k, prefix_v)
    _check_heads(qkv, prefix)
    _check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
    check.choice("form", form, FORMS)
    check.choice("composition", composition, COMPOSITIONS)
    if form == "relu" and composition == "gated":
        raise ValueError("form='relu' has no gate: use composition='add'")
    check.probability("dropout_p", dropout_p)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        check.update_scale(scale, 1)
    dispatch.announce("prefix", q.device)
    scores = Scores(attn_mask, bool(is_causal), float(scale))
    return attention_with_prefix(
        qkv, prefix, scores, Form(form, composition), float(dropout_p), training
    )


def _check_heads(qkv: QKV, prefix: Prefix) -> None:
    """Shapes and dtypes of the context and the prefix."""
    (q, k, v), (prefix_k, prefix_v) = qkv, prefix
    batch, heads, _, dim = q.shape
    check.tensor("k", k, (batch, "Hkv", "S", dim), q)
    kv_heads, keys = k.shape[1:3]
    check.tensor("v", v, (batch, kv_heads, keys, dim), q)
    check.tensor("prefix_k", prefix_k, (kv_heads, "P", dim), q)
    check.tensor("prefix_v", prefix_v, tuple(prefix_k.shape), q)
    check.same_dtype("q", q, k=k, v=v)
    check.trainable_dtype(q, prefix_k=prefix_k, prefix_v=prefix_v)
    if heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads, which does not divide q's {heads}")
    if prefix_k.shape[1] < 1:
        raise ValueError("prefix_k must hold at least one key (P >= 1), got P = 0")


def _check_mask(mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if mask is None:
        return
    check.tensor("attn_mask", mask, tuple(mask.shape), like)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("attn_mask requires a gradient, which prefix_attention does not compute")
    fits = mask.dim() in (2, 4) and all(
        have in (1, want) for have, want in zip(mask.shape, shape[-mask.dim() :])
    )
    if not fits:
        raise ValueError(
            f"attn_mask must be {shape[-2:]} or broadcast to {shape} (the prefix is not masked),"
            f" got {tuple(mask.shape)}"
        )
