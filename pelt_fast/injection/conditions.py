"""What a site rests on where it does a part of a layer's work, looked at before each forward.

Such a block is spelled out by its layer: the class's forward has to stay, its pieces have to stay
alone and without hooks. What may change and is read when it runs (activations, dropouts) is taken
over again. Whether what was taken over still runs is ``watch``'s.
"""

from torch import nn

from pelt_fast.modules.frozen_module import HOOKS, is_repatched
from pelt_fast.modules.late import Taken


class Alone:
    """A module that has to stay at ``owner.name``: a site does its work elsewhere and would pass by
    a wrapper around it."""

    def __init__(self, path: str, owner: nn.Module, name: str):
        self.path, self.owner, self.name = path, owner, name
        self.module = getattr(owner, name)

    def why_not(self) -> str | None:
        """What happened to it, or None."""
        found = getattr(self.owner, self.name, None)
        if found is self.module:
            return None
        was, now = type(self.module).__name__, type(found).__name__
        return f"was replaced after inject (it was a {was}, now it is a {now})"


class Unpatched:
    """A module whose class's forward is the one it was."""

    def __init__(self, path: str, module: nn.Module):
        self.path, self.module, self.forward = path, module, type(module).forward

    def why_not(self) -> str | None:
        """What happened to it, or None."""
        if is_repatched(self.module, self.forward):
            return "runs another forward since its class was patched after inject"
        return None


class Unhooked:
    """A module whose work a site does at another place: hooks on it would see other tensors.
    ``entry``: the site runs in its call, so that a hook of its input sees the right one."""

    def __init__(self, path: str, module: nn.Module, entry: bool):
        self.path, self.module = path, module
        self.hooks = tuple(name for name in HOOKS if not (entry and name == "_forward_pre_hooks"))

    def why_not(self) -> str | None:
        """What is on it, or None."""
        if any(getattr(self.module, name) for name in self.hooks):
            return "carries a hook, and the method does its work at another place"
        return None


class Conditions:
    """Forward pre-hook of a stack: RuntimeError where the method would not run as it should."""

    def __init__(self):
        self.conditions: list[Alone | Unpatched | Unhooked] = []
        self.taken: list[Taken] = []

    def __call__(self, stack: nn.Module, *_) -> None:
        again = [taken for taken in self.taken if taken.take()]  # each, not the first alone
        if again:
            for taken in self.taken:  # a module that two places share, let go of by one
                taken.take()
        for condition in self.conditions:
            why = condition.why_not()
            if why is not None:
                raise RuntimeError(
                    f"{condition.path} {why}: the model would not be the method on its base. Eject"
                    " first, then change the model, then inject again"
                )
