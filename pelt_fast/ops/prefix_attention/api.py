"""The public functions of prefix attention: arguments are checked, then the op runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common import arguments as check
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import QKV, Form, Prefix, RoutedPrefix, Scores

from .op import attention_with_prefix, attention_with_routed_prefix

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
    _check_prefix(prefix, _check_context(qkv), q)
    if prefix_k.shape[1] < 1:
        raise ValueError("prefix_k must hold at least one key (P >= 1), got P = 0")
    settings = _settings(qkv, attn_mask, is_causal, scale, Form(form, composition))
    check.probability("dropout_p", dropout_p)
    dispatch.announce("prefix", q.device)
    return attention_with_prefix(qkv, prefix, *settings, float(dropout_p), training)


def routed_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Tensor,
    prefix_k: Sequence[Tensor],
    prefix_v: Sequence[Tensor],
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    form: str = "softmax",
    composition: str = "gated",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """:func:`prefix_attention` with a prefix for each row of the batch: one batch, many methods.

    A row of method g has the result that ``prefix_attention`` gives for it with prefix g, and a row
    of none that of attention without a prefix. Dropout masks are drawn for the whole batch.

    Args:
        q: queries (B', H, T, D).
        k: keys (B', Hkv, S, D), H a multiple of Hkv.
        v: values (B', Hkv, S, D).
        routes: the method of each row, int64 (B): an index of ``prefix_k``, or -1 for none. B
            divides B': B' / B rows of q behind each other (the beams of a search) share a route.
        prefix_k: the trainable keys of each method (Hkv, P, D), each with its own P, of one dtype,
            q's or wider; P = 0 for a method without a prefix.
        prefix_v: the trainable values of each method, each of its keys' shape.
        attn_mask: the mask of the context alone: (T, S) or broadcastable to (B', H, T, S), bool
            (True is visible) or added to the scores.
        is_causal: whether query i sees only the keys j <= i + S - T (bottom-right aligned).
        scale: the factor of the scores; D ** -0.5 by default.
        form: the function of the prefix's scores, "softmax" or "relu" (multi-head adapter).
        composition: "gated" is prefix tuning, (1 - λ) h + λ Δh; "add" is h + Δh.
        dropout_p: the probability of the dropout on the weights, in [0, 1).
        training: whether the dropout acts.

    Returns:
        The heads (B', H, T, D), laid out in memory as (B', T, H, D).

    Raises:
        TypeError: an argument is no tensor, or of another dtype; the message names it.
        ValueError: an argument has another shape, device or value; the message names it.

    Saved:
        For backward: q, k, v, the output and its log-sum-exp (B', H, T), like attention without a
        prefix, and the keys and values of all methods, one behind the other. "add" also saves the
        context's own output.

    Example:
        >>> q, k, v = (torch.randn(3, 4, 7, 8) for _ in range(3))
        >>> keys, values = [[torch.randn(4, p, 8) for p in (2, 5)] for _ in range(2)]
        >>> routed_prefix_attention(q, k, v, torch.tensor([1, -1, 0]), keys, values).shape
        torch.Size([3, 4, 7, 8])
    """
    check.activation_tensor("q", q, 4)
    q, k, v = check.cast(q, k, v)
    qkv = QKV(q, k, v)
    _check_prefixes(prefix_k, prefix_v, _check_context(qkv), q)
    settings = _settings(qkv, attn_mask, is_causal, scale, Form(form, composition))
    check.probability("dropout_p", dropout_p)
    rows = _rows_of(routes, len(prefix_k), q)
    dispatch.announce("prefix", q.device)
    lengths = [p.shape[1] for p in prefix_k]
    prefix = RoutedPrefix(torch.cat([*prefix_k], 1), torch.cat([*prefix_v], 1), rows, lengths)
    return attention_with_routed_prefix(qkv, prefix, *settings, float(dropout_p), training)


def _settings(
    qkv: QKV, attn_mask: Tensor | None, is_causal: bool, scale: float | None, form: Form
) -> tuple[Scores, Form]:
    """The settings, checked, with the default scale."""
    q, k, _ = qkv
    _check_mask(attn_mask, (*q.shape[:3], k.shape[2]), q)
    check.choice("form", form.form, FORMS)
    check.choice("composition", form.composition, COMPOSITIONS)
    if form == Form("relu", "gated"):
        raise ValueError("form='relu' has no gate: use composition='add'")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        check.update_scale(scale, 1)
    return Scores(attn_mask, bool(is_causal), float(scale)), form


def _check_context(qkv: QKV) -> int:
    """Shapes and dtypes of the context; returns its number of heads."""
    q, k, v = qkv
    batch, heads, _, dim = q.shape
    check.tensor("k", k, (batch, "Hkv", "S", dim), q)
    kv_heads, keys = k.shape[1:3]
    check.tensor("v", v, (batch, kv_heads, keys, dim), q)
    check.same_dtype("q", q, k=k, v=v)
    if heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads, which does not divide q's {heads}")
    return kv_heads


def _check_prefix(prefix: Prefix, kv_heads: int, q: Tensor, place: str = "") -> None:
    """Shapes and dtypes of one prefix. ``place``: its index where there are many."""
    keys, values = f"prefix_k{place}", f"prefix_v{place}"
    check.tensor(keys, prefix.prefix_k, (kv_heads, "P", q.shape[-1]), q)
    check.tensor(values, prefix.prefix_v, tuple(prefix.prefix_k.shape), q)
    check.trainable_dtype(q, **{keys: prefix.prefix_k, values: prefix.prefix_v})


def _check_prefixes(
    prefix_k: Sequence[Tensor], prefix_v: Sequence[Tensor], kv_heads: int, q: Tensor
) -> None:
    """Both hold a prefix of every method, all of one dtype."""
    for name, tensors in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if not isinstance(tensors, (list, tuple)):
            kind = type(tensors).__name__
            raise TypeError(f"{name} must be a list of tensors, one for each method, got {kind}")
    if not prefix_k or len(prefix_k) != len(prefix_v):
        raise ValueError(
            "prefix_k and prefix_v must hold a tensor for each method, one or more,"
            f" got {len(prefix_k)} and {len(prefix_v)}"
        )
    first = Prefix(prefix_k[0], prefix_v[0])
    _check_prefix(first, kv_heads, q, "[0]")
    for i, pair in enumerate(zip(prefix_k, prefix_v)):
        if _is_like(Prefix(*pair), first):
            continue  # the checks below take four times as long, and there may be many methods
        _check_prefix(Prefix(*pair), kv_heads, q, f"[{i}]")
        for name, tensor, other in zip(Prefix._fields, pair, first):
            check.same_dtype(f"{name}[0]", other, **{f"{name}[{i}]": tensor})


def _is_like(prefix: Prefix, first: Prefix) -> bool:
    """Whether a prefix is right because the first is: but for P they are alike."""
    if not (isinstance(prefix.prefix_k, Tensor) and isinstance(prefix.prefix_v, Tensor)):
        return False
    shape, (heads, _, dim) = prefix.prefix_k.shape, first.prefix_k.shape
    alike = len(shape) == 3 and shape[0] == heads and shape[2] == dim
    return (
        alike
        and prefix.prefix_v.shape == shape
        and all(p.dtype == f.dtype and p.device == f.device for p, f in zip(prefix, first))
    )


def _rows_of(routes: Tensor, methods: int, q: Tensor) -> Tensor:
    """The method of each row of q, from the checked routes. On a GPU their values are not read."""
    check.tensor("routes", routes, ("B",), q)
    if routes.dtype != torch.int64:
        raise TypeError(f"routes must be torch.int64, got {routes.dtype}")
    rows, count = q.shape[0], routes.shape[0]
    if rows % max(count, 1) or (rows and not count):
        raise ValueError(f"routes has {count} rows, which does not divide the batch of q, {rows}")
    if routes.device.type == "cpu" and count and not torch.compiler.is_compiling():
        low, high = (int(value) for value in routes.aminmax())
        if low < -1 or high >= methods:
            raise ValueError(
                f"routes must be in [-1, {methods}), -1 or a method's index, got {low} to {high}"
            )
    if rows == count:
        return routes
    return routes.unsqueeze(1).expand(count, rows // count).reshape(rows)


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
