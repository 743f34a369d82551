"""The parts of a layer that a method uses. Only these must be known and there.

A part is a pair: where ("encoder", "decoder", "cross") and what: a field of ``AttentionLayout``,
"input" (what its module reads), or "ffn".
"""

import dataclasses
from collections.abc import Iterable, Iterator

from pelt_fast.config import Modification

from .layout import AttentionLayout, StackLayout

Parts = frozenset[tuple[str, str]]
ATTENTION = ("module", "q", "k", "v", "out")


def parts_of(modifications: Iterable[Modification]) -> Parts:
    """The parts that these modifications use."""
    return frozenset(
        (kind, what)
        for modification in modifications
        for what in _whats(modification)
        for kind in modification.where
    )


def _whats(m: Modification) -> Iterator[str]:
    if m.target.startswith("ffn"):
        yield "ffn"
    elif m.form == "low_rank" and m.target.startswith("attention."):
        yield from ("module", {"o": "out"}.get(m.target[-1], m.target[-1]))
    elif m.form == "prefix" or m.reads == "query":
        yield from ("module", "q", "k", "heads")
    elif m.form == "bottleneck":
        yield from ("module", "out")
        if m.insertion == "parallel":
            yield from ("q", "input")


def used(stack: StackLayout, parts: Parts | None) -> StackLayout:
    """The stack without its feed-forward block, if no method uses it."""
    if parts is None or stack.ffn is None or (stack.kind, "ffn") in parts:
        return stack
    return dataclasses.replace(stack, ffn=None, no_ffn="this method does not use it")


def used_of(attention: AttentionLayout, parts: Parts | None) -> list[str]:
    """The fields of an attention that are used."""
    return [what for what in ATTENTION if parts is None or (attention.kind, what) in parts]
