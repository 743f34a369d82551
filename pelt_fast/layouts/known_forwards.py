"""Which modules have a known forward, so that a site may do their work itself.

A module's forward is known if it was written with its class: it is defined in a class of
transformers' own model files, under that class's name, with only transformers' decorators around
it. It is not known if the class is a user's subclass, if the forward was put on the class or the
module later, or if another library (Liger) replaced the class. A model that is no transformers
class needs a layout; the classes in its own file then count as known.
"""

import inspect
import os
import sys

import transformers
from torch import nn

from pelt_fast.modules.frozen_module import described, foreign_forward

_HOME = os.path.dirname(transformers.__file__)
_MODELS = "transformers.models."


def own_file(base: nn.Module) -> str | None:
    """The Python module of a model's class, where neither it nor a parent is a model of
    transformers; else None."""
    if any(kind.__module__.startswith(_MODELS) for kind in type(base).__mro__):
        return None
    return type(base).__module__


def why_foreign(module: nn.Module, model_file: str | None = None) -> str | None:
    """Why the forward of ``module`` is not known, or None. ``model_file`` is the Python
    module of the model's class (:func:`own_file`)."""
    name, foreign = type(module).__name__, foreign_forward(module)
    if foreign is not None and not _is_accelerates(module):
        what = described(foreign)
        return f"the forward of its {name} was replaced by another library ({what})"
    for kind in type(module).__mro__:
        if not (kind.__module__.startswith(_MODELS) or kind.__module__ == model_file):
            return f"{name} is not a class of the model's own file: its forward is not known"
        if "forward" in vars(kind):
            known = _is_written_there(vars(kind)["forward"], kind)
            return None if known else f"the forward of the class {kind.__name__} was replaced"
    return f"{name} has no forward"


def _is_accelerates(module: nn.Module) -> bool:
    """Whether a module's instance forward is accelerate's hook around its class's forward."""
    inner = getattr(module, "_old_forward", None)
    return hasattr(module, "_hf_hook") and getattr(inner, "__func__", None) is type(module).forward


def _is_written_there(function, kind: type) -> bool:
    """Whether a forward is the one that the class ``kind`` was written with."""
    names = (getattr(function, "__module__", None), getattr(function, "__qualname__", None))
    if names != (kind.__module__, f"{kind.__qualname__}.forward"):
        return False
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    homes = tuple(filter(None, (_HOME + os.sep, file)))
    inner = inspect.unwrap(function, stop=lambda link: not _is_in(link, homes))
    return file is None or _is_in(inner, homes)


def _is_in(function, homes: tuple[str, ...]) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(homes)
