"""Changes of a method in the words of ``builders``: ``r=8, alpha=16, layers=range(8, 16)``.

A word changes every modification that it applies to. ``r`` alone keeps alpha, as in PEFT.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable
from typing import Any

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.config.named_modules import alpha_of, alpha_over, patterns_of, targets_of
from pelt_fast.config.word_values import flag, kinds_of, listed, scaled, whole

_RANKED = ("low_rank", "bottleneck")
_LAYERED = (*_RANKED, "prefix")


def _same(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {name: value}


# word -> the forms that it applies to, and the fields that its value gives
_WORDS: dict[str, tuple[tuple[str, ...], Callable[[Any], dict[str, Any]]]] = {
    "r": (_RANKED, lambda value: dict(size=whole("r", value))),
    "alpha": (("low_rank",), lambda value: {}),
    "rslora": (("low_rank",), lambda value: dict(rslora=flag("rslora", value))),
    "targets": (("low_rank",), lambda value: {}),
    "patterns": (("low_rank",), lambda value: {}),
    "scale": (_RANKED, scaled),
    "length": (("prefix", "prompt"), lambda value: dict(size=whole("length", value))),
    "gated": (
        ("prefix",),
        lambda value: dict(composition="gated" if flag("gated", value) else "add"),
    ),
    "mlp": (
        ("prefix",),
        lambda value: dict(reparameterization="mlp" if flag("mlp", value) else "none"),
    ),
    "mlp_dim": (("prefix",), _same("mlp_dim")),
    "dropout": (_RANKED, _same("dropout")),
    "init": (_RANKED, _same("init")),
    "activation": (("bottleneck",), _same("activation")),
    "layer_norm": (("bottleneck",), _same("layer_norm")),
    "layers": (_LAYERED, lambda value: dict(layers=listed(value))),
    "where": (_LAYERED, lambda value: dict(where=kinds_of(value))),
}


def changed(config: PeltConfig, words: dict[str, Any]) -> PeltConfig:
    """``config`` with ``words`` in place of its own values.

    Args:
        config: a method.
        words: values by the names that the builders give their arguments.

    Returns:
        A config of the same name.

    Raises:
        TypeError: a value has another type.
        ValueError: a word does not apply (the message names those that do), or its value is wrong.

    Example:
        >>> from pelt_fast.presets import method
        >>> changed(method("lora"), dict(r=8, alpha=16)).modifications[0].scale
        2.0
    """
    if not words:
        return config
    _check(config, words)
    if "scale" in words and words.keys() & {"alpha", "rslora"}:
        raise ValueError("scale and alpha say the same of a LoRA: give one of them")
    found: list[Modification] = []
    for m in config.modifications:
        found += _each_target(_changed(m, words), words, first=not _has(found, m.form))
    return dataclasses.replace(config, modifications=tuple(found))


def words_of(config: PeltConfig) -> list[str]:
    """The words that apply to a method."""
    forms = {m.form for m in config.modifications}
    return [word for word, (kinds, _) in _WORDS.items() if forms.intersection(kinds)]


def _check(config: PeltConfig, words: dict[str, Any]) -> None:
    known = words_of(config)
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            choice = f"choose {', '.join(known)}" if known else "no word does"
            raise ValueError(f"{word!r} does not apply to {config.name!r}{hint}: {choice}")


def _changed(m: Modification, words: dict[str, Any]) -> Modification:
    changes: dict[str, Any] = {}
    for word, value in words.items():
        forms, fields = _WORDS[word]
        if m.form in forms:
            changes |= fields(value)
    if m.form == "low_rank":
        changes |= _scale_and_patterns(m, words)
    return dataclasses.replace(m, **changes)


def _scale_and_patterns(m: Modification, words: dict[str, Any]) -> dict[str, Any]:
    """What r, alpha, rslora and scale make of a LoRA's scale, and of its patterns."""
    r, rslora = words.get("r", m.size), words.get("rslora", m.rslora)
    alpha, scale = words.get("alpha", alpha_of(m.size, m.scale, m.rslora)), words.get("scale")
    scale = 1.0 if isinstance(scale, str) else scale  # "learned" begins at 1
    changes, given = {}, words.get("patterns")
    if words.keys() & {"r", "alpha", "rslora"} and scale is None:
        changes |= scaled(alpha_over(r, alpha, rslora))
    if given is None and words.keys() & {"r", "alpha", "rslora", "scale"}:
        given = _given_patterns(m, r, scale is not None)
    if given is not None:
        changes["patterns"] = patterns_of(given, r, alpha, rslora, scale)
    return changes


def _given_patterns(m: Modification, r: int, by_scale: bool) -> dict[str, dict[str, Any]]:
    """A LoRA's patterns where its rank becomes ``r``. What is as in the rest of it follows: a rank,
    and an alpha, or the scale where that is given, which is then left out."""
    alpha, found = alpha_of(m.size, m.scale, m.rslora), {}
    for pattern, size, scale in m.patterns:
        own = alpha_of(size, scale, m.rslora)
        found[pattern] = dict(r=r if size == m.size else size)
        if not math.isclose(own, alpha) and not (by_scale and scale == m.scale):
            found[pattern]["alpha"] = own
    return found


def _each_target(m: Modification, words: dict[str, Any], first: bool) -> list[Modification]:
    """A LoRA's modification for each of the targets that were given, once."""
    if m.form != "low_rank" or "targets" not in words:
        return [m]
    if not first:
        return []
    return [dataclasses.replace(m, **target) for target in targets_of(words["targets"])]


def _has(found: list[Modification], form: str) -> bool:
    return any(m.form == form for m in found)


def parsed(settings: list[str]) -> dict[str, Any]:
    """Words as a command line has them: ``r=8``, ``targets=q,v``, ``layers=8-15``, ``mlp=false``.

    Args:
        settings: each "word=value".

    Returns:
        The words with their values.

    Raises:
        ValueError: one is no "word=value"; it names it.

    Example:
        >>> parsed(["r=8", "dropout=0.05", "layers=2-4,7"])
        {'r': 8, 'dropout': 0.05, 'layers': (2, 3, 4, 7)}
    """
    found: dict[str, Any] = {}
    for setting in settings:
        word, given, text = setting.partition("=")
        if not (word and given and text):
            raise ValueError(f"a setting must be word=value, as r=8, got {setting!r}")
        if word in found:
            raise ValueError(f"{word} is set twice")
        found[word] = _value(word, text)
    return found


def _value(word: str, text: str) -> Any:
    if word == "layers":
        return listed(text)
    if word == "patterns":
        return _patterns(text)
    if word == "targets":
        return text
    if word == "where":
        return kinds_of(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _patterns(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        example = '{"layers.0.*": {"r": 64}}'
        raise ValueError(f"patterns must be JSON, as {example}, got {text!r}") from None
