"""A config that describes a merged model, so that it is saved and loaded as a plain model.

A folded adapter leaves biases where there were none; a widened block has another width. The fields
of the config are tried one after the other. A change is kept if the weights of a fresh model then
differ less from the model's weights.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig

from pelt_fast.layouts.names import clean, is_method

Change = tuple[tuple[str, ...], str, object]  # sub-configs, field, value
_WIDTHS = ("inner", "intermediate", "ffn")  # in the names of fields that may be a width


def describe(model: nn.Module, widths: dict[int, int]) -> None:
    """Write the biases and widths (old: new) that ``model`` has now into ``model.config``. A linear
    layer that has a bias under the new config, and none now, gets one of zeros.

    Raises ValueError, the model unchanged, when no fields of the config can describe the model.
    """
    present = _shapes(model)
    config, changes = model.config, []
    left = _misfits(model, present, config)
    for change in _candidates(config, widths):
        if not left:
            break
        tried = _changed(config, [*changes, change])
        still_left = _misfits(model, present, tried)
        if len(still_left) < len(left):
            changes, left = [*changes, change], still_left
    if left:
        raise ValueError(
            f"no field of {type(config).__name__} says what this merge makes of"
            f" {', '.join(sorted(left)[:3])}: save_pretrained would write what loads as another"
            " model. Merge with keep_base=True"
        )
    config = _changed(config, changes)
    _fill_biases(model, _fresh(model, config).keys() - present.keys())
    _replace_config(model, changes)


def _shapes(model: nn.Module) -> dict[str, tuple]:
    named = model.named_parameters(remove_duplicate=False)
    return {clean(name): tuple(p.shape) for name, p in named if not is_method(name)}


def _fresh(model: nn.Module, config: PreTrainedConfig) -> dict[str, tuple]:
    """The shapes of a fresh model of the class, made on the meta device."""
    with torch.device("meta"):
        return _shapes(type(model)(copy.deepcopy(config)))


def _misfits(model: nn.Module, present: dict[str, tuple], config: PreTrainedConfig) -> set[str]:
    """The weights whose shape differs in a fresh model of this config; all weights if no model can
    be made."""
    try:
        fresh = _fresh(model, config)
    except Exception:  # a model's own code may raise any error on an unsuitable config
        return set(present)
    names = present.keys() | fresh.keys()
    differ = {name for name in names if present.get(name) != fresh.get(name)}
    return {name for name in differ if not _can_be_zero(model, name)}


def _can_be_zero(model: nn.Module, name: str) -> bool:
    """Whether it names the bias of a linear layer that has none."""
    path, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    return last == "bias" and isinstance(owner, nn.Linear) and owner.bias is None


def _candidates(
    config: PreTrainedConfig, widths: dict[int, int], path: tuple[str, ...] = ()
) -> Iterator[Change]:
    for field, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _candidates(value, widths, (*path, field))
        elif value is False and "bias" in field:
            yield path, field, True
        elif type(value) is int and value in widths:
            yield path, field, widths[value]
        elif value is None and any(word in field for word in _WIDTHS):
            yield from ((path, field, new) for new in widths.values())


def _changed(config: PreTrainedConfig, changes: list[Change]) -> PreTrainedConfig:
    """A copy with the changes."""
    copied = copy.deepcopy(config)
    for path, field, value in changes:
        part = copied
        for step in path:
            part = getattr(part, step)
        setattr(part, field, value)
    return copied


def _fill_biases(model: nn.Module, names: set[str]) -> None:
    for name in names:
        owner = model.get_submodule(name.rpartition(".")[0])
        zeros = owner.weight.new_zeros(owner.out_features)
        owner.bias = nn.Parameter(zeros, requires_grad=owner.weight.requires_grad)


def _replace_config(model: nn.Module, changes: list[Change]) -> None:
    """Give every module of the model the changed config. It is a copy, because another model may
    hold the old object."""
    memo = {id(model.config): _changed(model.config, changes)}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))
