"""Whether another library's wrapper keeps one of our forwards where eject cannot reach it."""

import types
from collections.abc import Callable

import torch
from torch import nn

from pelt_fast.modules.hooked import INNER, wrappers

_DEPTH = 6  # how many steps into closures and attributes are searched


def is_kept_inside(module: nn.Module, ours: Callable) -> bool:
    """Whether another forward of ``module`` may call ``ours`` from where it cannot be removed."""
    if ours in (module.__dict__.get("forward"), module.__dict__.get(INNER)):
        return False
    others = [value for name, value in module.__dict__.items() if name != "forward"]
    return _reaches(list(wrappers(module)), ours) or any(value is ours for value in others)


def _reaches(values: list, ours: Callable, depth: int = _DEPTH) -> bool:
    """Whether ``ours`` is one of the values, or is used by one of them."""
    for value in values:
        if value is ours:
            return True
        if depth == 0 or isinstance(value, (nn.Module, torch.Tensor, type)) or not callable(value):
            continue
        if _reaches(_used_by(value), ours, depth - 1):
            return True
    return False


def _used_by(function: Callable) -> list:
    """The values that a callable holds: closure cells, bound arguments, defaults, attributes."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()
             if cell != types.CellType()]  # fmt: skip
    bound = [getattr(function, name, None) for name in ("__func__", "__self__", "func")]
    given = [*getattr(function, "args", ()), *getattr(function, "keywords", {}).values()]
    defaults = list(getattr(function, "__defaults__", None) or ())
    attributes = list(getattr(function, "__dict__", {}).values())
    return [*cells, *bound, *given, *defaults, *attributes]
