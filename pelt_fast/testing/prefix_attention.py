"""The prefix's cases: attention over a prefix and the context."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast import functional

from .case import Case
from .expressions import drop, seeds_for


def prefix_case(p: float, form: str, composition: str, causal: bool, masked: bool) -> Case:
    """Four heads on two heads of keys, 9 queries, 13 keys, a prefix of 5; dropout p."""
    batch, heads, kv_heads, queries, keys, dim, length = 3, 4, 2, 9, 13, 8, 5

    def make():
        t = dict(q=torch.randn(batch, heads, queries, dim))
        t |= {name: torch.randn(batch, kv_heads, keys, dim) for name in ("k", "v")}
        t |= {name: torch.randn(kv_heads, length, dim) for name in ("prefix_k", "prefix_v")}
        if masked:
            t["attn_mask"] = torch.rand(batch, 1, queries, keys) > 0.3
            t["attn_mask"][0, :, 2] = False  # a row that sees no key
        return t

    def call(t):
        return functional.prefix_attention(
            **t, is_causal=causal, form=form, composition=composition, dropout_p=p
        )

    def expression(t):
        seeds = seeds_for(t["q"], p, 2)
        return _expression(t, form, composition, causal, p, seeds)

    name = f"{form} {composition}{' causal' if causal else ''}{' masked' if masked else ''} p={p}"
    return Case("prefix", name, make, call, expression, ("prefix_k", "prefix_v"))


def _expression(t, form, composition, causal, p, seeds) -> Tensor:
    """Concatenation: one softmax over [prefix; context], or two weights side by side."""
    q, low = t["q"], t["q"].dtype
    group = q.shape[1] // t["k"].shape[1]
    k, v = (t[name].repeat_interleave(group, 1) for name in ("k", "v"))
    pk, pv = (t[name].to(low).repeat_interleave(group, 0) for name in ("prefix_k", "prefix_v"))
    pk, pv = (prefix.expand(q.shape[0], -1, -1, -1) for prefix in (pk, pv))
    scale, length = q.shape[-1] ** -0.5, pk.shape[2]
    scores = scale * q @ torch.cat([pk, k], 2).transpose(-1, -2)
    visible = t.get("attn_mask")
    if causal:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        below = (columns <= rows + k.shape[2] - q.shape[2]).to(q.device)
        visible = below if visible is None else visible & below
    prefix, context = scores[..., :length], scores[..., length:]
    if visible is not None:
        context = context.masked_fill(~visible, float("-inf"))
    if composition == "gated":
        weights = torch.softmax(torch.cat([prefix, context], -1), -1)
        w_prefix, w_context = weights[..., :length], weights[..., length:]
    else:
        w_prefix = torch.softmax(prefix, -1) if form == "softmax" else F.relu(prefix)
        if visible is not None:
            # rows that see no key are 0: softmax over a safe row, then masked out
            context = context.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        w_context = torch.softmax(context, -1)
        if visible is not None:
            w_context = w_context * visible.any(-1, keepdim=True)
    return drop(w_prefix, p, seeds, 0) @ pv + drop(w_context, p, seeds, 1) @ v
