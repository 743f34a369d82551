"""Names of earlier versions: each still works, and warns once with the new name."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# old public name: the new one
RENAMED = {
    "AttentionSlot": "AttentionLayout",
    "FFNSlot": "FFNLayout",
    "PromptSlot": "PromptLayout",
    "SlotMap": "Layout",
    "StackSlot": "StackLayout",
    "activate": "set_active",
    "inject_several": "inject_named",
}


def warn(old: str, new: str) -> None:
    """Warn that ``old`` is called ``new`` now, at the user's line that has the name.

    ``from pelt_fast import old`` looks up the name twice, first for importlib and then for the
    user. Only the second look-up warns.
    """
    if sys._getframe(2).f_globals.get("__name__") == "importlib._bootstrap":
        return
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=3)


def renamed_keyword(
    old: str, new: str
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorator: the keyword argument ``old`` of a function means ``new``, with a warning.

    Raises TypeError when both are given.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def accepts_old(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(
                        f"{function.__name__} got {old} and {new}: {old} is the earlier name of"
                        f" {new}, give {new} alone"
                    )
                warn(f"{function.__name__}({old}=...)", f"{function.__name__}({new}=...)")
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accepts_old

    return decorate
