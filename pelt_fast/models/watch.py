"""What a method's sites rest on, looked at before each forward of a stack.

A module that a site sits on may be replaced after inject, and a site that nobody calls says nothing
itself. What may change and is read when it runs (activations, dropouts) is taken over again.
"""

from torch import nn

from pelt_fast.modules.late import Taken
from pelt_fast.modules.slot import HOOKS

from .places import Place, places
from .slots import StackSlot, find


class Found:
    """A module that was found at ``owner.name``. Something that calls it may stand there as well (a
    wrapper), unless it is ``alone``: a site then does the work of what stands beside it too."""

    def __init__(self, path: str, owner: nn.Module, name: str):
        self.path, self.owner, self.name, self.alone = path, owner, name, False
        self.module = getattr(owner, name)
        self.count = len(owner) if isinstance(owner, nn.ModuleList) else None

    def why_not(self) -> str | None:
        """What happened to it, or None."""
        found = getattr(self.owner, self.name, None)
        if found is self.module:
            return None
        if self.count is not None and len(self.owner) != self.count:
            return None  # layers that were taken out took their sites with them
        if not self.alone and isinstance(found, nn.Module) and self.module in found.modules():
            return None
        was, now = type(self.module).__name__, type(found).__name__
        return f"was replaced after inject (it was a {was}, now it is a {now})"


class Unpatched:
    """A module whose class's forward is the one it was."""

    def __init__(self, path: str, module: nn.Module):
        self.path, self.module, self.forward = path, module, type(module).forward

    def why_not(self) -> str | None:
        """What happened to it, or None."""
        same = type(self.module).forward is self.forward
        return None if same else "runs another forward since its class was patched after inject"


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


class Watch:
    """Forward pre-hook of a stack: RuntimeError where the method would not run as it should."""

    def __init__(self):
        self.conditions: list[Found | Unpatched | Unhooked] = []
        self.taken: list[Taken] = []
        self._found: dict[tuple[int, str], Found] = {}  # while the sites are made

    def __call__(self, stack: nn.Module, *_) -> None:
        # twice: a module that two places share may have been let go of by one
        for taken in (*self.taken, *self.taken):
            taken.take()
        for condition in self.conditions:
            why = condition.why_not()
            if why is not None:
                raise RuntimeError(
                    f"{condition.path} {why}: the model would not be the method on its base. Eject"
                    " first, then change the model, then inject again"
                )

    def expect(self, place: Place, layers: nn.ModuleList, inside: str, alone: bool) -> None:
        """Expect what a layer holds at ``inside`` to stay, and all that holds it."""
        steps = [str(place.index), *filter(None, inside.partition(":")[0].split("."))]
        path, owner = place.stack.layers, layers
        for step in steps:
            path = f"{path}.{step}"
            if (id(owner), step) not in self._found:
                self._found[id(owner), step] = found = Found(path, owner, step)
                self.conditions.append(found)
            owner, last = getattr(owner, step), self._found[id(owner), step]
        last.alone |= alone


def expect(base: nn.Module, place: Place, inside: str, takeover, alone: bool = False) -> None:
    """Let the stack of a place expect what its layer holds at ``inside``."""
    watch = takeover.watch(find(base, place.stack.owner))
    watch.expect(place, find(base, place.stack.layers), inside, alone)


def expect_sites(base: nn.Module, stacks: list[StackSlot], takeover) -> None:
    """Let each stack expect the modules its sites sit on."""
    known = {place.name: place for place in places(base, stacks)}
    for site in takeover.sites:
        steps = site.name.split(".")
        for depth in range(len(steps), 0, -1):
            place = known.get(".".join(steps[:depth]))
            if place is not None:
                expect(base, place, ".".join(steps[depth:]), takeover)
                break
