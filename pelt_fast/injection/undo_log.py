"""The changes made to a model, in order, so that each can be taken back.

A change is made and recorded in one call. ``undo`` takes the changes back, the last one first. The
log is part of the model (``model._pelt.changes``): it is copied and pickled with it.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from pelt_fast.modules.hooked import give_back, put
from pelt_fast.modules.late import Taken
from pelt_fast.modules.prompt import Prompt
from pelt_fast.modules.routed_prompt import RoutedPrompt

PROMPT = "pelt_prompt"  # the child of a stack's owner that holds its prompt


class _Absent:
    """Marks an attribute that did not exist. It is a class, so that a copy is the same object."""


class ForwardChange:
    """``module`` runs ``ours`` when it is called."""

    def __init__(self, module: nn.Module, ours: Callable):
        self.module, self.ours = module, ours
        self.before = put(module, ours)

    def undo(self) -> None:
        """Give the module the forward it had. One that another library put there since stays."""
        give_back(self.module, self.before, self.ours)


class AttributeChange:
    """``owner.name`` is ``ours``. ``watched`` says that it must not be changed by others."""

    def __init__(self, owner, name: str, ours, watched: bool):
        self.owner, self.name, self.ours, self.watched = owner, name, ours, watched
        self.before = owner.__dict__.get(name, _Absent)
        setattr(owner, name, ours)

    def undo(self) -> None:
        """Set the value from before. An unwatched one that others changed since is kept."""
        if not self.watched and self.owner.__dict__.get(self.name) is not self.ours:
            return
        if self.before is _Absent:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.before)


class ChildChange:
    """``owner`` has one more child module, in the same mode (training or not) as ``owner``."""

    def __init__(self, owner: nn.Module, name: str, child: nn.Module):
        self.owner, self.name = owner, name
        owner.add_module(name, child.train(owner.training))

    def undo(self) -> None:
        """Remove the child."""
        self.owner._modules.pop(self.name, None)


class HookChange:
    """A hook was registered."""

    def __init__(self, handle):
        self.handle = handle

    def undo(self) -> None:
        """Remove the hook."""
        self.handle.remove()


class TakenChange:
    """A site does the work of a layer's attribute."""

    def __init__(self, taken: Taken):
        self.taken = taken

    def undo(self) -> None:
        """Let the layer read its attribute again."""
        self.taken.give_back()


class UndoLog:
    """Every change to one model, in order."""

    def __init__(self):
        self._changes: list = []

    def call(self, module: nn.Module, forward: Callable) -> None:
        """Make ``module`` run ``forward`` when it is called, inside accelerate's hook where it has
        one."""
        self._changes.append(ForwardChange(module, forward))

    def take(self, taken: Taken) -> Taken:
        """Record that a site does the work of a layer's attribute."""
        self.record(TakenChange(taken))
        return taken

    def record(self, change) -> None:
        """Record a change that was made: an object with ``undo``."""
        self._changes.append(change)

    def set(self, owner, name: str, value, watched: bool = True) -> None:
        """Set a plain attribute. Others may change one that is not ``watched``; undo then keeps
        their value."""
        self._changes.append(AttributeChange(owner, name, value, watched))

    def add(self, owner: nn.Module, name: str, child: nn.Module) -> None:
        """Register ``child`` under ``owner``."""
        self._changes.append(ChildChange(owner, name, child))

    def put_in_front(self, owner: nn.Module, prompt: Prompt) -> Prompt | RoutedPrompt | None:
        """Register the prompt of a stack. Returns what hooks must put in front of the stack; None
        where they do so already."""
        self.add(owner, PROMPT, prompt)
        return prompt

    def for_all(self) -> AbstractContextManager:
        """In this block changes are made that methods share."""
        return contextlib.nullcontext()

    def child(self, owner: nn.Module, name: str) -> nn.Module | None:
        """The child of this name that the method which is built now has, or None."""
        return owner._modules.get(name)

    def hook(self, handle) -> None:
        """Record the handle of a hook."""
        self._changes.append(HookChange(handle))

    def undo(self) -> None:
        """Take every change back, the last one first."""
        while self._changes:
            self._changes.pop().undo()

    def forwards(self) -> dict[nn.Module, Callable]:
        """The forward that each changed module must keep, by module."""
        return {c.module: c.ours for c in self._changes if isinstance(c, ForwardChange)}

    def attributes(self) -> dict[tuple[nn.Module, str], object]:
        """The value that each watched attribute must keep, by owner and name."""
        return self._values(
            c for c in self._changes if isinstance(c, AttributeChange) and c.watched
        )

    def children(self) -> dict[tuple[nn.Module, str], nn.Module]:
        """The child modules that were added, by owner and name."""
        return self._values(c for c in self._changes if isinstance(c, ChildChange))

    @staticmethod
    def _values(changes) -> dict:
        return {(c.owner, c.name): getattr(c.owner, c.name) for c in changes}

    def hooked(self, model: nn.Module) -> list[nn.Module]:
        """The modules of ``model`` that hold one of our hooks."""
        hooks = [c.handle for c in self._changes if isinstance(c, HookChange)]
        tables = {id(handle.hooks_dict_ref()) for handle in hooks}
        return [m for m in model.modules()
                if {id(m._forward_pre_hooks), id(m._forward_hooks)} & tables]  # fmt: skip
