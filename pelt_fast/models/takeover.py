"""Every change injection makes to a model, recorded so that eject can take it back."""

import torch
from torch import nn

from pelt_fast.config import PeltConfig
from pelt_fast.modules.late import Dropout, Taken
from pelt_fast.modules.slot import passthrough

from .before import Before
from .handles import carrier_of
from .watch import Watch


class MovedDropout:
    """Forward hook of an attention whose output dropout moved here from a shared attribute."""

    def __init__(self, dropout: Dropout):
        self.dropout = dropout

    def __call__(self, module: nn.Module, args, output):
        first, *rest = output
        return self.dropout(first), *rest


class Takeover:
    """The changes made to one model, in order, and the sites that were added.

    Lives on the model as ``model._pelt``; copies and pickles with it.
    """

    def __init__(self, config: PeltConfig, pack: bool = True):
        self.config, self.pack = config, pack
        self.sites: list[Site] = []
        self.head: list[str] = []  # names of the task head's parameters
        self.biases: list[str] = []  # and of the base's biases that are the method
        self.trainable_before: dict[str, bool] = {}
        self.merged: list[str] = []  # names of the sites folded into the base
        self.before = Before()  # the values that eject and unmerge give back
        self.configs: list = []  # the copies that stand in the place of the model's configs
        self._undo: list[tuple] = []
        self._watches: list[tuple[nn.Module, Watch]] = []

    @property
    def own_trained(self) -> set[str]:
        """Names of the model's own parameters that train."""
        return {*self.head, *self.biases}

    @property
    def values_before(self) -> dict[str, torch.Tensor]:
        """The values, by name, that the model's own parameters that train had before."""
        return self.before.values

    def call(self, module: nn.Module, forward) -> None:
        """Let ``module`` run ``forward`` when called; what another library put there comes back."""
        self._undo.append(("attribute", module, "forward", module.__dict__.get("forward", _Absent)))
        module.forward = forward

    def bypass(self, owner: nn.Module, name: str) -> None:
        """Let the module or function ``owner.name`` return its input."""
        value = getattr(owner, name)
        if isinstance(value, nn.Module):
            self.call(value, passthrough)
        else:
            self.set(owner, name, passthrough)

    def take(self, taken: Taken) -> Taken:
        """Keep what gives a layer's attribute back."""
        self._undo.append(("taken", taken))
        return taken

    def watch(self, stack: nn.Module) -> Watch:
        """What is looked at before each forward of ``stack``."""
        for known, watch in self._watches:
            if known is stack:
                return watch
        watch = Watch()
        self.hook(stack.register_forward_pre_hook(watch))
        self._watches.append((stack, watch))
        return watch

    def set(self, owner, name: str, value) -> None:
        """Set a plain attribute."""
        self._undo.append(("attribute", owner, name, owner.__dict__.get(name, _Absent)))
        setattr(owner, name, value)

    def add(self, owner: nn.Module, name: str, child: nn.Module) -> None:
        """Register a site's module, in the mode (training or not) its owner is in."""
        self._undo.append(("child", owner, name))
        owner.add_module(name, child.train(owner.training))

    def hook(self, handle) -> None:
        """Keep the handle of a hook."""
        self._undo.append(("hook", handle))

    def undo(self) -> None:
        """Take every change back, the last first."""
        while self._undo:
            kind, *what = self._undo.pop()
            if kind == "child":
                delattr(*what)
            elif kind == "hook":
                what[0].remove()
            elif kind == "taken":
                what[0].give_back()
            else:
                owner, name, value = what
                delattr(owner, name) if value is _Absent else setattr(owner, name, value)


class _Absent:
    """Stands for an attribute that was not there (a class, so that copies keep its identity)."""


class Site:
    """One modified place: its name in the model, the op it runs and the module behind it."""

    def __init__(self, name: str, op: str, form: str, module: nn.Module, **details):
        self.name, self.op, self.form, self.module = name, op, form, module
        self.details = details


def takeover_of(model: nn.Module) -> Takeover:
    """The takeover of the model a handle stands for (``handles.carrier_of``)."""
    return carrier_of(model)._pelt
