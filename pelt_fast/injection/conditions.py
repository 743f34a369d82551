"""Conditions that are checked before each forward, if a site does a part of a layer's work.

The layer's own forward calls the pieces of such a block. The class's forward must stay the same,
the pieces must stay in their places, and they must have no hooks. Activations and dropouts may
change: the site takes them over again. ``watch`` checks whether inject's own forwards still run.
"""

import torch
from torch import nn

from pelt_fast.modules.decision import HOOKS, Basis
from pelt_fast.modules.frozen_module import is_repatched
from pelt_fast.modules.generation import generation, is_first
from pelt_fast.modules.late import Taken


class Alone:
    """The module ``owner.name`` must stay there: the site would not call a wrapper around it."""

    def __init__(self, path: str, owner: nn.Module, name: str):
        self.path, self.owner, self.name = path, owner, name
        self.module = getattr(owner, name)

    def rests_on(self, basis: Basis) -> None:
        """Tell ``basis`` what :meth:`why_not` looks at."""
        basis.attribute(self.owner, self.name)

    def why_not(self) -> str | None:
        """What happened to it, or None."""
        now = getattr(self.owner, self.name, None)
        if now is self.module:
            return None
        kinds = type(self.module).__name__, type(now).__name__
        return f"was replaced after inject (it was a {kinds[0]}, now it is a {kinds[1]})"


class Unpatched:
    """The class of the module must keep its forward."""

    def __init__(self, path: str, module: nn.Module):
        self.path, self.module, self.forward = path, module, type(module).forward

    def rests_on(self, basis: Basis) -> None:
        """Tell ``basis`` what :meth:`why_not` looks at."""
        basis.kinds.append((self.module, type(self.module), type(self.module).forward))

    def why_not(self) -> str | None:
        """What happened to it, or None."""
        if is_repatched(self.module, self.forward):
            return "runs another forward since its class was patched after inject"
        return None


class Unhooked:
    """The module must have no hooks: a site does its work in another call, where hooks would see
    other tensors. ``entry``: the site runs in this module's own call, so that a hook on its input
    sees the right tensor."""

    def __init__(self, path: str, module: nn.Module, entry: bool):
        self.path, self.module = path, module
        self.hooks = tuple(name for name in HOOKS if not (entry and name == "_forward_pre_hooks"))

    def rests_on(self, basis: Basis) -> None:
        """Tell ``basis`` what :meth:`why_not` looks at."""
        basis.tables(self.module, self.hooks)

    def why_not(self) -> str | None:
        """What is on it, or None."""
        if any(getattr(self.module, name) for name in self.hooks):
            return "carries a hook, and the method does its work at another place"
        return None


class Conditions:
    """Forward pre-hook of a stack: RuntimeError if a condition no longer holds. The conditions are
    checked again only if something that they read has changed, and once in a generate."""

    def __init__(self):
        self.conditions: list[Alone | Unpatched | Unhooked] = []
        self.taken: list[Taken] = []
        self._checked: Basis | None = None

    def __call__(self, stack: nn.Module, *_) -> None:
        if torch.compiler.is_compiling():
            self.check()
            return
        if generation.kept is None or is_first(self):
            self._look()

    def _look(self) -> None:
        """Check if something has changed since the last check."""
        if self._checked is None or self._checked.look() is None:
            self.check()
            basis = Basis()
            for taken in self.taken:
                taken.is_taken_on(basis)
            for condition in self.conditions:
                condition.rests_on(basis)
            self._checked = basis

    def check(self) -> None:
        """Check everything, and take over again attributes that may have changed."""
        changed = [taken for taken in self.taken if taken.take()]  # a list: each is asked
        if changed:
            for taken in self.taken:  # one module in two layers: the first one released it
                taken.take()
        for condition in self.conditions:
            why = condition.why_not()
            if why is not None:
                raise RuntimeError(
                    f"{condition.path} {why}: the model would not be the method on its base. Eject"
                    " first, then change the model, then inject again"
                )
