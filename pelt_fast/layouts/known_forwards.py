"""The one rule for whose maths a site may do in a module's place.

A module's forward is known where it is the one its class was written with: found in a class of
transformers' own model files, under that class's name, with nothing but transformers' decorators
around it. A subclass of the user's, a forward that was put on the class or on the module itself, a
class of another library's in the place of transformers' (Liger) are not. A model that is no
transformers class at all comes with a row of the user's, who vouches for the classes of its file.
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
    """The file (a module's name) of a model's class that is not, and inherits from no, model of
    transformers'."""
    if any(kind.__module__.startswith(_MODELS) for kind in type(base).__mro__):
        return None
    return type(base).__module__


def why_foreign(module: nn.Module, own: str | None = None) -> str | None:
    """Why the forward of ``module`` is not known, or None; ``own`` is the model's own file."""
    name, foreign = type(module).__name__, foreign_forward(module)
    if foreign is not None and not _is_accelerates(module):
        what = described(foreign)
        return f"the forward of its {name} was replaced by another library ({what})"
    for kind in type(module).__mro__:
        if not (kind.__module__.startswith(_MODELS) or kind.__module__ == own):
            return f"{name} is not a class of the model's own file: its forward is not known"
        if "forward" in vars(kind):
            known = _is_written_there(vars(kind)["forward"], kind)
            return None if known else f"the forward of the class {kind.__name__} was replaced"
    return f"{name} has no forward"


def _is_accelerates(module: nn.Module) -> bool:
    """Whether what stands on a module is accelerate's hook around its own forward."""
    inner = getattr(module, "_old_forward", None)
    return hasattr(module, "_hf_hook") and getattr(inner, "__func__", None) is type(module).forward


def _is_written_there(function, kind: type) -> bool:
    """Whether a forward is the one that the file of ``kind`` defines in it."""
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
