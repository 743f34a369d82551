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


def routed_prefix_case(p: float, form: str, composition: str) -> Case:
    """A row with a prefix of 3, one without, one with a prefix of 5; a mask without dropout."""
    one = prefix_case(p, form, composition, causal=False, masked=p == 0)
    lengths, routes = (5, 3), (1, -1, 0)
    trained = tuple(f"prefix_{side}{method}" for side in "kv" for method in range(len(lengths)))

    def make():
        t = {name: value for name, value in one.make().items() if name not in one.trainable}
        kv_heads, dim = t["k"].shape[1], t["k"].shape[3]
        if "attn_mask" in t:
            t["attn_mask"][1, :, 2] = True  # what sees nothing at all has no plain expression
        shapes = [(kv_heads, length, dim) for length in (*lengths, *lengths)]
        return t | {name: torch.randn(shape) for name, shape in zip(trained, shapes)}

    def call(t):
        sides = [[t[name] for name in trained[first : first + 2]] for first in (0, 2)]
        given = {name: value for name, value in t.items() if name not in trained}
        return functional.routed_prefix_attention(
            **given, routes=torch.tensor(routes, device=t["q"].device), prefix_k=sides[0],
            prefix_v=sides[1], form=form, composition=composition, dropout_p=p,
        )  # fmt: skip

    def expression(t):
        """Every prefix as long as the longest, its last keys hidden; of a row of none all keys."""
        wide = {
            name: F.pad(t[name], (0, 0, 0, max(lengths) - t[name].shape[1])) for name in trained
        }
        rows = [max(method, 0) for method in routes]
        both = {
            f"prefix_{side}": torch.stack([wide[f"prefix_{side}{row}"] for row in rows])
            for side in "kv"
        }
        counts = [0 if method < 0 else lengths[method] for method in routes]
        counts = torch.tensor(counts, device=t["q"].device).view(-1, 1, 1, 1)
        present = torch.arange(max(lengths), device=t["q"].device) < counts
        seeds = seeds_for(t["q"], p, 2)
        return _expression(t | both, form, composition, False, p, seeds, present)

    return Case("prefix", f"routed {one.name}", make, call, expression, trained)


def _softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax, 0 in rows that see nothing: over a safe row, then masked out."""
    if visible is None:
        return torch.softmax(scores, -1)
    some = visible.any(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(~some, 0.0), -1) * some


def _expression(t, form, composition, causal, p, seeds, present=None) -> Tensor:
    """Concatenation: one softmax over [prefix; context], or two weights side by side. ``present``:
    the keys of the prefix that a row of the batch has, if not all."""
    q, low = t["q"], t["q"].dtype
    group = q.shape[1] // t["k"].shape[1]
    k, v = (t[name].repeat_interleave(group, 1) for name in ("k", "v"))
    pk, pv = (t[name].to(low).repeat_interleave(group, -3) for name in ("prefix_k", "prefix_v"))
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
    if present is not None:
        prefix = prefix.masked_fill(~present, float("-inf"))
    if composition == "gated":
        weights = torch.softmax(torch.cat([prefix, context], -1), -1)
        w_prefix, w_context = weights[..., :length], weights[..., length:]
    else:
        w_prefix = _softmax(prefix, present) if form == "softmax" else F.relu(prefix)
        w_context = _softmax(context, visible)
    return drop(w_prefix, p, seeds, 0) @ pv + drop(w_context, p, seeds, 1) @ v
