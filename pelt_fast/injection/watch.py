"""Every injection looked at again, whenever a stack begins to run.

After inject another library may patch a module that a site runs in the place of, or put another
module where it is: the site is then dead without a word. The watch is a forward pre-hook of each
stack: it compares what was taken by identity, and says who stands there instead.
"""

from collections.abc import Callable

import torch
from torch import nn

from pelt_fast.modules.hooked import wrappers

from .record import Injection, holds


def watch(model: nn.Module, owners: list[nn.Module], injection: Injection) -> None:
    """Look at what was taken in ``model`` whenever one of ``owners``, or the model for what
    lies outside of them, begins its forward; undone with the rest."""
    paths = {module: path for path, module in model.named_modules()}
    forwards, attributes, children = injection.taken()
    modules = [*forwards, *(owner for owner, _ in (*attributes, *children)),
               *injection.hooked(model)]  # fmt: skip
    if not modules:
        return
    inner: dict[nn.Module, nn.Module] = {}
    for owner in owners:
        for module in owner.modules():
            inner.setdefault(module, owner)
    watches = {owner: Watch(injection.config.name) for owner in (model, *owners)}
    for owner in dict.fromkeys(owners):
        watches[model].children += _steps(model, owner, paths)
    for module in dict.fromkeys(modules):
        if module in paths:  # PEFT's own wrapper is around the model
            owner = inner.get(module, model)
            watches[owner].children += _steps(owner, module, paths)
    for module, ours in forwards.items():
        if module in paths:
            found = watches[inner.get(module, model)]
            found.forwards.append((paths[module], module, ours))
    for (module, name), value in attributes.items():
        if module in paths:
            found = watches[inner.get(module, model)]
            found.attributes.append((f"{paths[module]}.{name}", module, name, value))
    for (module, name), child in children.items():
        if module in paths:
            found = watches[inner.get(module, model)]
            found.children.append((f"{paths[module]}.{name}", module, (name,), child, None))
    for owner, found in watches.items():
        if found.settle():
            injection.hook(owner.register_forward_pre_hook(found, prepend=True))


def _steps(owner: nn.Module, module: nn.Module, paths: dict) -> list[tuple]:
    """The way from ``owner`` down to ``module``: (path, parent, steps, child, count), a list of so
    many layers passed over with the step after it."""
    top = paths[owner]
    below = paths[module].removeprefix(top).removeprefix(".")
    found, parent, at, steps, count = [], owner, owner, (), None
    for step in below.split(".") if below else ():
        at, steps, top = at._modules[step], (*steps, step), f"{top}.{step}".removeprefix(".")
        if isinstance(at, (nn.ModuleList, nn.ModuleDict)):
            count = len(at)
        else:
            found.append((top, parent, steps, at, count))
            parent, steps, count = at, (), None
    return found


class Watch:
    """Forward pre-hook: RuntimeError when what was taken over is not what runs any more."""

    def __init__(self, method: str):
        self.method = method
        self.forwards: list | tuple = []  # (path, module, ours)
        self.attributes: list | tuple = []  # (path, module, name, value)
        self.children: list | tuple = []  # (path, parent, steps, child, layers of a list between)

    def settle(self) -> bool:
        """Each once, and no more of them; whether there is any."""
        self.forwards, self.attributes = tuple(self.forwards), tuple(self.attributes)
        self.children = tuple(dict.fromkeys(self.children))
        return bool(self.forwards or self.attributes or self.children)

    def __call__(self, *_) -> None:
        """Look; while a graph is traced once, as a constant: its guards know each forward."""
        if torch.compiler.is_compiling():
            _look_now(self)
        else:
            self.look()

    def look(self) -> None:
        """Compare everything."""
        for path, module, ours in self.forwards:
            if module.__dict__.get("forward") is not ours:
                self._wrapped(path, module, ours)
        for path, module, name, value in self.attributes:
            found = module.__dict__.get(name)
            if found is not value and not (isinstance(value, (int, float)) and found == value):
                self._refuse(f"{path} is {_what(found)} now")
        for path, parent, steps, child, count in self.children:
            found = _down(parent, steps)
            if found is child or _contains(found, child):
                continue
            layers = None if count is None else _down(parent, steps[:-1])
            if layers is not None and len(layers._modules) != count:
                continue  # layers that were taken out took their sites with them
            self._refuse(f"{path} is {_what(found)} now, not the {type(child).__name__}")

    def _wrapped(self, path: str, module: nn.Module, ours: Callable) -> None:
        """Somebody else's forward: it has to say that it wraps ours."""
        if not any(found is ours for found in wrappers(module)):
            found = module.__dict__.get("forward", type(module).forward)
            self._refuse(f"{path}.forward is {_what(found)} now", holds(module, ours))

    def _refuse(self, what: str, first: bool = False) -> None:
        raise RuntimeError(
            f"{what}, put there after {self.method!r} was injected, which no longer runs there."
            f" {'Take that off again' if first else 'Eject, make that change, and inject again'}"
        )


def _down(parent: nn.Module, steps: tuple[str, ...]) -> nn.Module | None:
    """The module that the steps lead to; None where one is missing."""
    for step in steps:
        parent = None if parent is None else parent._modules.get(step)
    return parent


@torch.compiler.assume_constant_result
def _look_now(found: Watch) -> bool:
    """What a trace does instead of reading every comparison into its guards."""
    found.look()
    return True


def _contains(found: nn.Module | None, child: nn.Module) -> bool:
    """Whether a wrapper (a compiled or checkpointed layer, PEFT's) stands around ``child``."""
    return found is not None and any(module is child for module in found.modules())


def _what(found) -> str:
    """Who that is: module and name of a function, class of anything else."""
    if found is None:
        return "gone"
    found = getattr(found, "func", found)  # a partial's
    found = getattr(found, "__func__", found)  # a method's
    if hasattr(found, "__code__"):  # its own name, whatever functools.wraps wrote over it
        name = getattr(found.__code__, "co_qualname", found.__code__.co_name)
        return f"{found.__globals__['__name__']}.{name}"
    named = found if hasattr(found, "__qualname__") else type(found)
    return f"{named.__module__}.{named.__qualname__}"


def check_free(model: nn.Module, injection: Injection) -> None:
    """RuntimeError when another library's wrapper holds a forward of ours where eject cannot reach
    it: the method would stay alive in there."""
    paths = {module: path for path, module in model.named_modules()}
    forwards, *_ = injection.taken()
    for module, ours in forwards.items():
        if holds(module, ours):
            found = module.__dict__.get("forward", type(module).forward)
            raise RuntimeError(
                f"{paths.get(module, type(module).__name__)}.forward is {_what(found)}, which keeps"
                f" {injection.config.name!r} inside: take that wrapper off first (what put it there"
                " has a call for it), then eject"
            )
