"""Every change injection makes to a model, recorded so that eject can take it back."""

import types

import torch
from torch import nn

from pelt_fast.config import PeltConfig
from pelt_fast.modules.hooked import INNER, give_back, put, wrappers
from pelt_fast.modules.late import Dropout, Taken

from .conditions import Conditions
from .handles import carrier_of
from .values_before import Before


class MovedDropout:
    """Forward hook of an attention whose output dropout moved here from a shared attribute."""

    def __init__(self, dropout: Dropout):
        self.dropout = dropout

    def __call__(self, module: nn.Module, args, output):
        first, *rest = output
        return self.dropout(first), *rest


class Injection:
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
        self._conditions: list[tuple[nn.Module, Conditions]] = []

    @property
    def own_trained(self) -> set[str]:
        """Names of the model's own parameters that train."""
        return {*self.head, *self.biases}

    @property
    def values_before(self) -> dict[str, torch.Tensor]:
        """The values, by name, that the model's own parameters that train had before."""
        return self.before.values

    def call(self, module: nn.Module, forward) -> None:
        """Let ``module`` run ``forward`` when called, inside the hook of accelerate it may have;
        what another library put there comes back."""
        self._undo.append(("forward", module, put(module, forward), forward))

    def take(self, taken: Taken) -> Taken:
        """Keep what gives a layer's attribute back."""
        self._undo.append(("taken", taken))
        return taken

    def conditions_of(self, stack: nn.Module) -> Conditions:
        """What has to hold before each forward of ``stack``."""
        for known, conditions in self._conditions:
            if known is stack:
                return conditions
        conditions = Conditions()
        self.hook(stack.register_forward_pre_hook(conditions))
        self._conditions.append((stack, conditions))
        return conditions

    def set(self, owner, name: str, value, watched: bool = True) -> None:
        """Set a plain attribute. One that is not watched may be set by others as well, and stays
        what they made of it."""
        kind = "attribute" if watched else "loose"
        self._undo.append((kind, owner, name, owner.__dict__.get(name, _Absent), value))
        setattr(owner, name, value)

    def taken(self) -> tuple[dict, dict, dict]:
        """What has to stay as it is, the last change of each: forwards {module: ours}, attributes
        and children {(module, name): value}."""
        forwards, attributes, children = {}, {}, {}
        for kind, *what in self._undo:
            if kind == "forward":
                module, _, ours = what
                forwards[module] = ours
            elif kind in ("attribute", "child"):
                owner, name, *_ = what
                held = attributes if kind == "attribute" else children
                held[owner, name] = getattr(owner, name)
        return forwards, attributes, children

    def hooked(self, model: nn.Module) -> list[nn.Module]:
        """The modules of ``model`` that our hooks sit on."""
        tables = {id(what[0].hooks_dict_ref()) for kind, *what in self._undo if kind == "hook"}
        return [m for m in model.modules()
                if {id(m._forward_pre_hooks), id(m._forward_hooks)} & tables]  # fmt: skip

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
            if kind == "forward":
                give_back(*what)
            elif kind == "child":
                owner, name = what
                owner._modules.pop(name, None)
            elif kind == "hook":
                what[0].remove()
            elif kind == "taken":
                what[0].give_back()
            else:
                owner, name, before, ours = what
                if kind == "loose" and owner.__dict__.get(name) is not ours:
                    continue
                delattr(owner, name) if before is _Absent else setattr(owner, name, before)


def holds(module: nn.Module, ours) -> bool:
    """Whether somebody's forward of ``module`` may call ours from where it cannot be taken."""
    if ours in (module.__dict__.get("forward"), module.__dict__.get(INNER)):
        return False
    kept = [value for name, value in module.__dict__.items() if name != "forward"]
    return _reaches(list(wrappers(module)), ours) or any(value is ours for value in kept)


def _reaches(values: list, ours, depth: int = 6) -> bool:
    """Whether ``ours`` is among the values, or what they are made of: closures, bound arguments,
    attributes of callables."""
    for value in values:
        if value is ours:
            return True
        if depth == 0 or isinstance(value, (nn.Module, torch.Tensor, type)) or not callable(value):
            continue
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()
                 if cell != types.CellType()]  # fmt: skip
        bound = [getattr(value, name, None) for name in ("__func__", "__self__", "func")]
        given = [*getattr(value, "args", ()), *getattr(value, "keywords", {}).values()]
        defaults = list(getattr(value, "__defaults__", None) or ())
        held = list(getattr(value, "__dict__", {}).values())
        if _reaches([*cells, *bound, *given, *defaults, *held], ours, depth - 1):
            return True
    return False


class _Absent:
    """Stands for an attribute that was not there (a class, so that copies keep its identity)."""


class Site:
    """One modified place: its name in the model, the op it runs and the module behind it."""

    def __init__(self, name: str, op: str, form: str, module: nn.Module, **details):
        self.name, self.op, self.form, self.module = name, op, form, module
        self.details = details


def injection_of(model: nn.Module) -> Injection:
    """The injection of the model a handle stands for (``handles.carrier_of``)."""
    return carrier_of(model)._pelt
