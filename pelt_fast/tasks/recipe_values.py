"""What the values of a recipe may be: their types, as a YAML file has them, and their ranges."""

import dataclasses
import sys

# the least value that a number may have; learning_rate and label_smoothing have ranges of their own
LEAST = {
    **dict.fromkeys(("batch_size", "accumulation", "max_length", "max_target", "beams",
                     "max_generated", "eval_batch_size"), 1),
    **dict.fromkeys(("steps", "epochs", "prefix_rate", "warmup", "weight_decay", "adam_epsilon",
                     "max_grad_norm", "batch_tokens", "min_generated", "no_repeat_ngram",
                     "evaluate_every", "eval_examples", "seed"), 0),
}  # fmt: skip
MOST = {"seed": 2**32 - 1}
_KINDS = {str: "text", bool: "true or false", dict: "a mapping",
          str | dict: "a preset's name or a mapping"}  # fmt: skip


def typed(key: str, value, kind, source: str):
    """The value in the type of its field: YAML reads 1e-4 as text. Raises ValueError, which names
    the file and the key, for a value of another type."""
    if kind in (int, float):
        return _number(key, value, kind, source)
    if kind in _KINDS and not isinstance(value, kind):
        raise ValueError(f"{source}: {key} must be {_KINDS[kind]}, got {value!r}")
    return value


def _number(key: str, value, kind, source: str):
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{source}: {key} must be a number, got {value!r}") from None
    if kind is int and number.is_integer():
        return int(number)
    if kind is int:
        raise ValueError(f"{source}: {key} must be an integer, got {value!r}")
    return number


def check_numbers(recipe) -> None:
    """ValueError for a number of a recipe that is below the least one, or is none."""
    for item in dataclasses.fields(recipe):
        if item.name in LEAST:
            _check_number(item.name, getattr(recipe, item.name), item.type)
    betas = recipe.adam_betas
    if not isinstance(betas, (list, tuple)) or len(betas) != 2 or not all(map(_is_beta, betas)):
        raise ValueError(f"adam_betas must be two numbers in [0, 1), got {betas!r}")


def _check_number(name: str, value, kind) -> None:
    least, most = LEAST[name], MOST.get(name, sys.float_info.max)
    if _is_number(value, int if kind is int else (int, float)) and least <= value <= most:
        return
    what = "an integer" if kind is int else "a number"
    last = f" and <= {most}" if name in MOST else ""
    raise ValueError(f"{name} must be {what} >= {least}{last}, got {value!r}")


def _is_beta(value) -> bool:
    return _is_number(value, (int, float)) and 0 <= value < 1


def _is_number(value, kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def with_length(changes: dict) -> dict:
    """The changes of a recipe. ``steps`` and ``epochs`` both say how long a run is: where one is
    named alone, it replaces the other."""
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in changes and other not in changes:
            return {**changes, other: 0}
    return changes
