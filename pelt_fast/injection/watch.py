"""A check before each forward of a stack: the model still runs the changes of inject.

After inject another library may patch a module whose work a site does, or replace the module. The
site then no longer runs, without any error. The watch is a forward pre-hook of each stack. It
compares by identity, and raises an error that names what it found.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pelt_fast.modules.generation import generation, is_first
from pelt_fast.modules.hooked import wrappers

from .record import Injection
from .wrapped_forward import is_kept_inside


def watch(model: nn.Module, owners: list[nn.Module], injection: Injection) -> None:
    """Check the changes of ``injection`` before each forward of ``owners``. Changes outside all of
    them are checked before the model's forward. Removed together with the other changes."""
    paths = {module: path for path, module in model.named_modules()}
    changed = _changed_modules(model, injection)
    if not changed:
        return
    nearest: dict[nn.Module, nn.Module] = {}
    for owner in owners:
        for module in owner.modules():
            nearest.setdefault(module, owner)
    watches = {owner: Watch(injection.config.name) for owner in (model, *owners)}
    for owner in dict.fromkeys(owners):
        watches[model].children += _steps(model, owner, paths)
    for module in changed:
        if module in paths:  # PEFT's own wrapper is around the model
            owner = nearest.get(module, model)
            watches[owner].children += _steps(owner, module, paths)
    _add_changes(injection, paths, lambda module: watches[nearest.get(module, model)])
    for owner, checks in watches.items():
        if checks.settle():
            injection.changes.hook(_hook_first(owner, checks))


def _hook_first(owner: nn.Module, checks: "Watch") -> RemovableHandle:
    """Register a pre-hook that runs before the others. They are inserted behind it again: dynamo of
    torch 2.11 reads hooks in the order of their insertion, which ``prepend`` does not change."""
    hooks = owner._forward_pre_hooks
    before = list(hooks)
    handle = owner.register_forward_pre_hook(checks)
    for key in before:
        hooks[key] = hooks.pop(key)
    return handle


def _changed_modules(model: nn.Module, injection: Injection) -> list[nn.Module]:
    """Every module that a change is on, each once."""
    changes = injection.changes
    owners = (owner for owner, _ in (*changes.attributes(), *changes.children()))
    return list(dict.fromkeys([*changes.forwards(), *owners, *changes.hooked(model)]))


def _add_changes(
    injection: Injection, paths: dict[nn.Module, str], watch_of: Callable[[nn.Module], "Watch"]
) -> None:
    """Hand each change to the watch of its module."""
    for module, ours in injection.changes.forwards().items():
        if module in paths:
            watch_of(module).forwards.append((paths[module], module, ours))
    for (module, name), value in injection.changes.attributes().items():
        if module in paths:
            entry = f"{paths[module]}.{name}", module, name, value
            watch_of(module).attributes.append(entry)
    for (module, name), child in injection.changes.children().items():
        if module in paths:
            entry = f"{paths[module]}.{name}", module, (name,), child, None
            watch_of(module).children.append(entry)


def _steps(owner: nn.Module, module: nn.Module, paths: dict) -> list[tuple]:
    """The path from ``owner`` down to ``module``: (path, parent, steps, child, count). A list of
    layers and the step after it are one step; ``count`` is the length of the list."""
    top = paths[owner]
    below = paths[module].removeprefix(top).removeprefix(".")
    way, parent, at, steps, count = [], owner, owner, (), None
    for step in below.split(".") if below else ():
        at, steps, top = at._modules[step], (*steps, step), f"{top}.{step}".removeprefix(".")
        if isinstance(at, (nn.ModuleList, nn.ModuleDict)):
            count = len(at)
        else:
            way.append((top, parent, steps, at, count))
            parent, steps, count = at, (), None
    return way


class Watch:
    """Forward pre-hook: RuntimeError when something else runs than what inject put there."""

    def __init__(self, method: str):
        self.method = method
        self.forwards: list | tuple = []  # (path, module, ours)
        self.attributes: list | tuple = []  # (path, module, name, value)
        self.children: list | tuple = []  # (path, parent, steps, child, length of a list between)

    def settle(self) -> bool:
        """Make the lists final, each entry once; return whether there is any entry."""
        self.forwards, self.attributes = tuple(self.forwards), tuple(self.attributes)
        self.children = tuple(dict.fromkeys(self.children))
        return bool(self.forwards or self.attributes or self.children)

    def __call__(self, *_) -> None:
        """Check, in the first step of a generate only. While a graph is traced this is a constant:
        the graph's guards know each forward."""
        if torch.compiler.is_compiling():
            self._look_now()
            return
        if generation.kept is None or is_first(self):
            self.look()

    def look(self) -> None:
        """Compare everything."""
        for path, module, ours in self.forwards:
            if module.__dict__.get("forward") is not ours:
                self._check_wrapped(path, module, ours)
        for path, module, name, value in self.attributes:
            now = module.__dict__.get(name)
            if now is not value and not (isinstance(value, (int, float)) and now == value):
                self._refuse(f"{path} is {_described(now)} now")
        for path, parent, steps, child, count in self.children:
            now = _down(parent, steps)
            if now is child or _contains(now, child):
                continue
            layers = None if count is None else _down(parent, steps[:-1])
            if layers is not None and len(layers._modules) != count:
                continue  # layers were removed together with their sites
            self._refuse(f"{path} is {_described(now)} now, not the {type(child).__name__}")

    @torch.compiler.assume_constant_result
    def _look_now(self) -> bool:
        """:meth:`look` at trace time, so that the comparisons do not become guards. A method,
        because torch 2.11 takes no object as the argument of such a function."""
        self.look()
        return True

    def _check_wrapped(self, path: str, module: nn.Module, ours: Callable) -> None:
        """Another forward is allowed only when it says that it wraps ours."""
        if not any(inner is ours for inner in wrappers(module)):
            now = module.__dict__.get("forward", type(module).forward)
            removable = is_kept_inside(module, ours)
            self._refuse(f"{path}.forward is {_described(now)} now", removable)

    def _refuse(self, what: str, removable: bool = False) -> None:
        way_out = (
            "Take that off again" if removable else "Eject, make that change, and inject again"
        )
        raise RuntimeError(
            f"{what}, put there after {self.method!r} was injected, which no longer runs there."
            f" {way_out}"
        )


def _down(parent: nn.Module, steps: tuple[str, ...]) -> nn.Module | None:
    """The module at the end of the steps; None where one is missing."""
    for step in steps:
        parent = None if parent is None else parent._modules.get(step)
    return parent


def _contains(module: nn.Module | None, child: nn.Module) -> bool:
    """Whether a wrapper (a compiled or checkpointed layer, PEFT's) is around ``child``."""
    return module is not None and any(inner is child for inner in module.modules())


def _described(value) -> str:
    """Module and name of a function, or the class of anything else."""
    if value is None:
        return "gone"
    value = getattr(value, "func", value)  # of a partial
    value = getattr(value, "__func__", value)  # of a method
    if hasattr(value, "__code__"):  # its own name, also where functools.wraps wrote another
        name = getattr(value.__code__, "co_qualname", value.__code__.co_name)
        return f"{value.__globals__['__name__']}.{name}"
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def check_free(model: nn.Module, injection: Injection) -> None:
    """RuntimeError if another library's wrapper keeps one of our forwards inside: eject cannot
    reach it there, and the method would still run."""
    paths = {module: path for path, module in model.named_modules()}
    for module, ours in injection.changes.forwards().items():
        if is_kept_inside(module, ours):
            now = module.__dict__.get("forward", type(module).forward)
            raise RuntimeError(
                f"{paths.get(module, type(module).__name__)}.forward is {_described(now)}, which"
                f" keeps {injection.config.name!r} inside: take that wrapper off first (what put it"
                " there has a call for it), then eject"
            )
