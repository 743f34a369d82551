"""The values that ``builders`` and ``words`` take: checked by the name that the caller used."""

from collections.abc import Iterable
from typing import Any

from .grid import KINDS

LEARNED = {"learned": "learned_scale", "learned_channel": "learned_channel_scale"}
SUBLAYERS = ("attention", "ffn")


def whole(name: str, value: int) -> int:
    """An integer of 1 or more."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return value


def flag(name: str, value: bool) -> bool:
    """True or False: a text such as "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {value!r}")
    return value


def scaled(scale: float | str) -> dict[str, Any]:
    """The composition that a scale implies."""
    if isinstance(scale, str):
        if scale not in LEARNED:
            known = " or ".join(LEARNED)
            raise ValueError(f"scale must be a number, {known}; got {scale!r}")
        return dict(composition=LEARNED[scale], scale=1.0)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    return dict(composition="add" if scale == 1 else "scaled", scale=float(scale))


def listed(layers: str | Iterable[int] | None) -> tuple[int, ...] | None:
    """The numbers of layers, also of a text as "0,2,8-15"; None is all of them."""
    if layers is None:
        return None
    if isinstance(layers, str):
        return _numbered(layers)
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list or a range, as [{layers}], got {layers!r}")
    return tuple(layers)


def _numbered(text: str) -> tuple[int, ...]:
    """The layers of "8-15" or "0,2,4-6"."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise ValueError(f"layers must be numbers and ranges, as 0,2,8-15, got {text!r}")
        if last and int(last) < int(first):
            raise ValueError(f"layers must run from small to large, as 2-5, got {text!r}")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def kinds_of(where: str | Iterable[str]) -> tuple[str, ...]:
    """Kinds of attentions and stacks, a list or one text with commas."""
    if isinstance(where, str):
        where = [kind.strip() for kind in where.split(",")]
    if not isinstance(where, Iterable):
        raise TypeError(f"where must name {', '.join(KINDS)}, got {where!r}")
    return tuple(where)


def sublayers(name: str, value: str) -> list[str]:
    """The parts of "attention", "ffn" or "attention+ffn"."""
    found = [part.strip() for part in value.split("+")] if isinstance(value, str) else [value]
    if not set(found) <= set(SUBLAYERS) or len(set(found)) < len(found):
        wanted = "attention, ffn or attention+ffn"
        raise ValueError(f"{name} must be {wanted}; got {value!r}")
    return sorted(found)
