"""The first layers of a large model: a config of them alone, and what they tell of the others.

Two layers are alike when their modules and the shapes of their weights are. As many of the first
layers are taken as have one of each kind.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.lookup import base_of, find

_COUNTS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers",
           "num_decoder_layers")  # fmt: skip


def first_layers(model: nn.Module, whole):
    """The config of the first layers of ``model``, whose own config is ``whole``."""
    config = copy.deepcopy(whole)
    text = config.get_text_config()
    counts = {name: getattr(text, name, None) for name in _COUNTS}
    counts = {name: count for name, count in counts.items() if isinstance(count, int)}
    few = max((_enough(layers) for layers in _lists(model, set(counts.values()))), default=1)
    for name, value in list(vars(text).items()):  # a list with an entry for each layer
        if isinstance(value, (list, tuple)) and len(value) in counts.values():
            setattr(text, name, value[:few])
    for name, count in counts.items():
        setattr(text, name, min(count, few))
    return config


def _lists(model: nn.Module, counts: set[int]) -> Iterator[nn.ModuleList]:
    """The lists of layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) in counts:
            yield module


def _enough(layers: nn.ModuleList) -> int:
    """The number of the first layers that have one of each kind."""
    kinds = [_kind(layer) for layer in layers]
    return 1 + max(kinds.index(kind) for kind in kinds)


def _kind(layer: nn.Module) -> tuple:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    return modules, tuple((name, p.shape) for name, p in layer.named_parameters())


def of_all_layers(layout: Layout, few: nn.Module, model: nn.Module) -> Layout | None:
    """The layout of ``model`` by that of its first layers, ``few``; None where layers of one kind
    have different layouts there, or a forward has changed the kind."""
    stacks, known = [], set()
    for stack in layout.stacks:
        first, layers = (find(base_of(m), stack.layers) for m in (few, model))
        only = range(len(first)) if stack.only is None else stack.only
        kinds = {_kind(first[index]) for index in only}
        if kinds - set(map(_kind, layers)) or any((stack.layers, kind) in known for kind in kinds):
            return None
        known |= {(stack.layers, kind) for kind in kinds}
        like = tuple(index for index, layer in enumerate(layers) if _kind(layer) in kinds)
        stacks.append(replace(stack, only=None if len(like) == len(layers) else like))
    return replace(layout, stacks=tuple(stacks))
