"""A prefix chooses its attention on the config, and models share config objects: while it is
injected, a model has configs of its own, alike and of the same identities."""

import copy

from torch import nn
from transformers import PreTrainedConfig

from .record import Injection

_CHOICE = "_attn_implementation_internal"


class OwnConfig:
    """A config, the copy that stands in its place, and what the copy said first."""

    def __init__(self, shared: PreTrainedConfig, own: PreTrainedConfig):
        self.shared, self.own = shared, own
        self.first = copy.deepcopy(vars(own))

    def give_back(self) -> None:
        """Tell the shared config what was changed on the copy, but for the attention."""
        for name, value in vars(self.own).items():
            changed = name not in self.first or self.first[name] != value
            if changed and name != _CHOICE and not isinstance(value, PreTrainedConfig):
                setattr(self.shared, name, value)


def own_configs(model: nn.Module, injection: Injection) -> None:
    """Put a copy in the place of every config that a module of ``model`` holds: what was one object
    is one again, and no other model's."""
    memo: dict = {}
    pairs: dict[int, OwnConfig] = {}
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                own = copy.deepcopy(value, memo)
                pairs.setdefault(id(value), OwnConfig(value, own))
                injection.changes.set(module, name, own, watched=False)
    injection.configs = list(pairs.values())


def return_configs(injection: Injection) -> None:
    """Before the shared configs stand in their places again: give them what was changed since."""
    for config in injection.configs:
        config.give_back()
    injection.configs = []
