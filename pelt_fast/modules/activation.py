"""Which function an activation really applies, under the name that the ops use.

The module or function of the model decides, not the name in a config. Known are exact types whose
forward is unchanged, and the functions of torch.
"""

import functools
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations as hf

from .frozen_module import foreign_forward, is_hooked

_FUNCTIONS = (
    (F.gelu, "gelu"), (F.relu, "relu"), (torch.relu, "relu"), (Tensor.relu, "relu"),
    (F.silu, "silu"), (torch.tanh, "tanh"), (F.tanh, "tanh"), (Tensor.tanh, "tanh"),
)  # fmt: skip
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by torch's name of the formula
_MODULES = {
    nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Identity: "identity",
    hf.SiLUActivation: "silu", hf.NewGELUActivation: "gelu_tanh", hf.LinearActivation: "identity",
}  # fmt: skip
# modules that choose a formula in __init__: by the function they hold
_HOLDERS = {hf.GELUActivation: "gelu", hf.GELUTanh: "gelu_tanh"}
_PYTHON = (hf.GELUActivation._gelu_python, hf.GELUTanh._gelu_tanh_python)
# the forwards as the classes define them; a forward patched later is another function
_FORWARDS = {kind: kind.forward for kind in (nn.GELU, *_MODULES, *_HOLDERS)}


def name_of(activation) -> str | None:
    """The ops' name of what a module or function computes; None if they have no name for it."""
    if not isinstance(activation, nn.Module):
        return _function(activation)
    kind = type(activation)
    if kind not in _FORWARDS or kind.forward is not _FORWARDS[kind]:
        return None
    if is_hooked(activation) or foreign_forward(activation) is not None:
        return None
    if kind is nn.GELU:
        return _GELUS.get(activation.approximate)
    if kind in _HOLDERS:
        held = activation.act
        python = isinstance(held, MethodType) and held.__func__ in _PYTHON
        return _HOLDERS[kind] if python or _function(held) == _HOLDERS[kind] else None
    return _MODULES[kind]


def _function(function) -> str | None:
    if isinstance(function, functools.partial):
        if function.func is not F.gelu or function.args:
            return None
        return _GELUS.get(function.keywords.get("approximate", "none"))
    return next((name for known, name in _FUNCTIONS if function is known), None)
