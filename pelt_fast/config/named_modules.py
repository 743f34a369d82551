"""What a LoRA is on: the paper's projections, or linear layers by their names, as in PEFT."""

import math
import re
from collections.abc import Iterable
from typing import Any

LINEARS = {
    "q": "attention.q", "k": "attention.k", "v": "attention.v", "o": "attention.o",
    "ffn.in": "ffn.in", "ffn.out": "ffn.out",
}  # fmt: skip
MODULES = "modules"  # the target whose modules are found by name
ALL_LINEAR = "all-linear"
Pattern = tuple[str, int, float]  # a regular expression, and the size and scale of what it matches
_REGULAR = set(r"\^$*+?{}[]|()")  # what only a regular expression has


def targets_of(targets: str | Iterable[str]) -> list[dict[str, Any]]:
    """The fields of a modification for each of a LoRA's targets.

    Raises ValueError for a text that is none of them, and TypeError for what holds no text.
    """
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return [dict(target=MODULES, modules=ALL_LINEAR)]
        if _REGULAR & set(targets):
            _check_regular("targets", targets)
            return [dict(target=MODULES, modules=targets)]
    words = [word.strip() for word in _words(targets)]
    if not words or "" in words:
        raise ValueError(f"targets must name at least one of {', '.join(LINEARS)}, got none")
    names = list(dict.fromkeys(LINEARS.get(word, word) for word in words))
    if set(names) <= set(LINEARS.values()):
        return [dict(target=name, modules=None) for name in names]
    if isinstance(targets, str) and len(words) == 1:
        raise ValueError(
            f"targets must be of {', '.join(LINEARS)}, {ALL_LINEAR!r}, a list of module names, as"
            f" [{targets!r}], or a regular expression, as '.*{targets}'; got {targets!r}"
        )
    return [dict(target=MODULES, modules=tuple(dict.fromkeys(words)))]


def _words(targets: str | Iterable[str]) -> list[str]:
    if isinstance(targets, str):
        return targets.split(",")
    if not isinstance(targets, Iterable):
        raise TypeError(f"targets must be a text or names, got {type(targets).__name__}")
    words = list(targets)
    other = [word for word in words if not isinstance(word, str)]
    if other:
        raise TypeError(f"targets must hold names, got {type(other[0]).__name__}")
    return words


def alpha_over(r: int, alpha: float, rslora: bool = False) -> float:
    """What the update is multiplied by."""
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    if type(r) is not int or r < 1:
        raise ValueError(f"r must be an integer >= 1, got {r!r}")
    return alpha / _divisor(r, rslora)


def alpha_of(r: int, scale: float, rslora: bool = False) -> float:
    """The alpha that gives a scale."""
    return scale * _divisor(r, rslora)


def _divisor(r: int, rslora: bool) -> float:
    return r**0.5 if rslora else r


def patterns_of(
    patterns: dict[str, dict[str, Any]] | None,
    r: int,
    alpha: float,
    rslora: bool = False,
    scale: float | None = None,
) -> tuple[Pattern, ...]:
    """Patterns as PEFT's rank_pattern and alpha_pattern have them. What one leaves out, r or alpha,
    is that of the other modules; with ``scale`` these have that scale instead of an alpha."""
    if patterns is None:
        return ()
    if not isinstance(patterns, dict):
        raise TypeError(f"patterns must be a dict, got {type(patterns).__name__}")
    found = []
    for pattern, words in patterns.items():
        if not isinstance(words, dict) or not words or not words.keys() <= {"r", "alpha"}:
            raise ValueError(f"patterns[{pattern!r}] must be dict(r=, alpha=), got {words!r}")
        size = words.get("r", r)
        try:
            own = alpha_over(size, words.get("alpha", alpha), rslora)
        except (TypeError, ValueError) as error:
            raise type(error)(f"patterns[{pattern!r}]: {error}") from None
        found.append((pattern, size, own if scale is None or "alpha" in words else scale))
    return checked_patterns(found)


def checked_modules(modules: Any) -> str | tuple[str, ...]:
    """``all-linear``, a regular expression, or endings of names; ValueError for another value."""
    if isinstance(modules, str) and modules:
        if modules != ALL_LINEAR:
            _check_regular("modules", modules)
        return modules
    if not isinstance(modules, (tuple, list)) or not modules:
        raise ValueError(f"modules must be a text or names, at least one, got {modules!r}")
    if not all(isinstance(name, str) and name for name in modules):
        raise ValueError(f"modules must hold names, got {modules!r}")
    return tuple(modules)


def checked_patterns(patterns: Iterable) -> tuple[Pattern, ...]:
    """The patterns; ValueError for one that is no regular expression, size and scale."""
    found: list[Pattern] = []
    for given in patterns:
        if not isinstance(given, (tuple, list)) or len(given) != 3:
            raise ValueError(f"patterns must hold (pattern, size, scale), got {given!r}")
        pattern, size, scale = given
        if not isinstance(pattern, str):
            raise ValueError(f"a pattern must be a text, got {pattern!r}")
        _check_regular("patterns", pattern)
        if type(size) is not int or size < 1:
            raise ValueError(f"patterns[{pattern!r}]: size must be an integer >= 1, got {size!r}")
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"patterns[{pattern!r}]: scale must be a finite number, got {scale!r}")
        found.append((pattern, size, float(scale)))
    return tuple(found)


def _check_regular(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: {pattern!r} is no regular expression: {error}") from None
