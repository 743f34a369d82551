"""The changes that several methods make to one model, so that all of them stay in it."""

import contextlib
from collections.abc import Callable, Iterator

from torch import nn

from pelt_fast.modules.frozen_module import OWN, passthrough
from pelt_fast.modules.methods import Methods, RoutedLoRA
from pelt_fast.modules.own_parameters import RoutedOwn
from pelt_fast.modules.place import Place
from pelt_fast.modules.projection_view import JOINED, LORA, ProjectionView
from pelt_fast.modules.prompt import Prompt
from pelt_fast.modules.routed_prompt import RoutedPrompt
from pelt_fast.modules.routed_slice import RoutedSlice
from pelt_fast.modules.routing import Routing
from pelt_fast.modules.switch import Switch

from .attention_interface import SLICE
from .undo_log import PROMPT, ChildChange, UndoLog


class RoutedLog(UndoLog):
    """An undo log in which methods share places. ``method`` is the name of the one that is built
    now; None: a change of the whole model."""

    def __init__(self, routing: Routing, switch: Switch):
        super().__init__()
        self.routing, self.switch = routing, switch
        self.method: str | None = None
        self.places: dict[nn.Module, Place] = {}
        self.silent: set[nn.Module] = set()  # modules whose work a feed-forward block does
        self.hooks: dict[str | None, list] = {}  # the handles of each method's hooks
        self.fronts: dict[nn.Module, RoutedPrompt] = {}  # by the owners of their stacks

    @property
    def _id(self) -> int:
        return self.routing.ids[self.method]

    def call(self, module: nn.Module, forward: Callable) -> None:
        if forward is passthrough:
            self.silent.add(module)
        if self.method is None or forward is passthrough:
            super().call(module, forward)
            return
        self.share(module).put(self._id, forward)

    @contextlib.contextmanager
    def for_all(self) -> Iterator[None]:
        method, self.method = self.method, None
        try:
            yield
        finally:
            self.method = method

    def share(self, module: nn.Module) -> Place:
        """The place at which methods share ``module``; made at the first call. A module whose work
        a block does stays silent: the block finds the LoRA on it."""
        if module not in self.places:
            self.places[module] = Place(module, self.routing, self.switch)
            if module not in self.silent:
                super().call(module, self.places[module].__call__)
        return self.places[module]

    def set(self, owner, name: str, value, watched: bool = True) -> None:
        if self.method is None or name != SLICE:
            if self.method is None or name not in owner.__dict__:
                super().set(owner, name, value, watched)
            return
        known = owner.__dict__.get(SLICE)
        if known is None:
            known = RoutedSlice(self.routing, self.switch)
            super().set(owner, name, known, watched)
        known.put(self._id, value)

    def add(self, owner: nn.Module, name: str, child: nn.Module) -> None:
        part = isinstance(owner, ProjectionView) and owner.which is not None
        if self.method is None or part:
            super().add(owner, name, child)
            return
        known = owner._modules.get(name)
        if known is None:
            known = self._methods(owner, name)
            super().add(owner, name, known)
        known.put(self.method, child.train(owner.training))

    def hook(self, handle) -> None:
        super().hook(handle)
        self.hooks.setdefault(self.method, []).append(handle)

    def drop(self, method: str) -> None:
        """Take the changes of one method back; those of the others stay."""
        number = self.routing.ids[method]
        for handle in self.hooks.pop(method, []):
            handle.remove()
        for place in self.places.values():
            place.drop(number)
        for (owner, name), shared in self.children().items():
            if isinstance(shared, Methods):
                shared._modules.pop(method, None)
                if not shared._modules:
                    self._forget(owner, name)
        for shared in self.attributes().values():
            if isinstance(shared, RoutedSlice):
                shared.drop(number)

    def _forget(self, owner: nn.Module, name: str) -> None:
        """Remove a child that no method has any more."""
        owner._modules.pop(name)
        self._changes = [c for c in self._changes if not _is_child(c, owner, name)]

    def put_in_front(self, owner: nn.Module, prompt: Prompt) -> RoutedPrompt | None:
        new = owner not in self.fronts
        front = self.fronts.setdefault(owner, RoutedPrompt(self.routing, self.switch))
        if PROMPT not in owner._modules:
            super().add(owner, PROMPT, front)
        front.put(self.method, prompt.train(owner.training))
        return front if new else None

    def child(self, owner: nn.Module, name: str) -> nn.Module | None:
        found = super().child(owner, name)
        if self.method is None or not isinstance(found, Methods):
            return found
        return found._modules.get(self.method)

    def _methods(self, owner: nn.Module, name: str) -> Methods:
        if name == LORA:
            return RoutedLoRA(self.routing, self.switch, owner)
        if name == OWN:
            return RoutedOwn(self.routing, self.switch)
        if name == JOINED:
            whole = ProjectionView(owner, "", None)
            return RoutedLoRA(self.routing, self.switch, whole)
        return Methods(self.routing, self.switch)


def _is_child(change, owner: nn.Module, name: str) -> bool:
    return isinstance(change, ChildChange) and (change.owner, change.name) == (owner, name)
