"""Configs that belong to one model alone.

A prefix chooses its attention on the config, and models share config objects. While a prefix is
injected, the model has copies: one copy for each config object.
"""

import copy

from torch import nn
from transformers import PreTrainedConfig

from .record import Injection

CHOICE = "_attn_implementation_internal"  # where a config holds the choice of the attention


class OwnConfig:
    """A shared config, the model's copy of it, and the first values of the copy."""

    def __init__(self, shared: PreTrainedConfig, copied: PreTrainedConfig):
        self.shared, self.copied = shared, copied
        self.first = copy.deepcopy(vars(copied))

    def write_back(self) -> None:
        """Write the changes on the copy, except the attention, to the shared config."""
        for name, value in vars(self.copied).items():
            if name == CHOICE or _holds_configs(value):
                continue
            if name not in self.first or self.first[name] != value:
                setattr(self.shared, name, value)


def _holds_configs(value) -> bool:
    """Whether a value is a config or contains some: each has its own copy."""
    inside = value.values() if isinstance(value, dict) else value
    held = inside if isinstance(value, (dict, list, tuple)) else [value]
    return any(isinstance(each, PreTrainedConfig) for each in held)


def own_configs(model: nn.Module, injection: Injection) -> None:
    """Replace every config that a module of ``model`` holds by a copy."""
    memo: dict = {}
    pairs: dict[int, OwnConfig] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                copied = copy.deepcopy(value, memo)
                if id(value) not in pairs:
                    pairs[id(value)] = OwnConfig(value, copied)
                injection.changes.set(module, name, copied, watched=False)
    injection.configs = list(pairs.values())


def return_configs(injection: Injection) -> None:
    """Write the changes on the copies to the shared configs. Called before undo restores the
    shared configs."""
    for config in injection.configs:
        config.write_back()
    injection.configs = []
