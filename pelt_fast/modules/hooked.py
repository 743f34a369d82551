"""Modules with accelerate's hooks: the hook wraps the forward and may load offloaded weights.

``dispatch_model``, ``cpu_offload`` and ``device_map`` put a wrapper on a module's instance
``forward`` and keep the forward before it as ``_old_forward``. An offloaded weight is on the meta
device. The hook loads it before the forward and frees it after the forward.
"""

import functools
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

HOOK, INNER = "_hf_hook", "_old_forward"  # accelerate's names


def holder_of(module: nn.Module) -> nn.Module:
    """The module that holds the weight; for a part of a projection, the owner of the part."""
    return module.__dict__.get("owner", module)


def forward_attribute_of(module: nn.Module) -> str:
    """The attribute that holds the module's own forward: inside accelerate's wrapper, if there is
    one, so that the hook runs around each forward that is put there."""
    hooked = HOOK in module.__dict__ and INNER in module.__dict__
    return INNER if hooked else "forward"


def put(module: nn.Module, forward: Callable) -> Callable | None:
    """Make ``module`` run ``forward``, inside its hook if it has one. Return the value before."""
    attribute = forward_attribute_of(module)
    before = module.__dict__.get(attribute)
    setattr(module, attribute, forward)
    return before


def give_back(module: nn.Module, before: Callable | None, ours: Callable) -> None:
    """Restore the attribute that holds our forward to its value before. accelerate's wrapper may
    hold our forward inside. A forward that is not ours and does not hold ours is kept."""
    for attribute in ("forward", INNER):
        if module.__dict__.get(attribute) is not ours:
            continue
        if before is not None:
            setattr(module, attribute, before)
        elif attribute == INNER:
            setattr(module, attribute, type(module).forward.__get__(module))
        else:
            delattr(module, attribute)


def is_away(module: nn.Module) -> bool:
    """Whether a weight of this module is offloaded now, so that only its hook can load it."""
    module = holder_of(module)
    if module.__dict__.get(HOOK) is None:
        return False
    return any(p is not None and p.is_meta for p in module._parameters.values())


def _hooks(module: nn.Module) -> list:
    hook = module.__dict__.get(HOOK)
    return list(getattr(hook, "hooks", [hook]))  # a SequentialHook holds several


def _offloads(module: nn.Module):
    """The hook that offloads a module's weights, or None."""
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def brought_to(module: nn.Module) -> torch.device:
    """The device to which the hook loads the offloaded weights."""
    return torch.device(_offloads(holder_of(module)).execution_device)


def run(module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
    """Run ``forward`` inside the hook of ``module``, if it has one. If the hook has loaded the
    weights already, run it without the hook."""
    hook = module.__dict__.get(HOOK)
    if hook is None or (_offloads(module) is not None and not is_away(module)):
        return forward(*args, **kwargs)
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, forward(*args, **kwargs))


def holders(model: nn.Module, names: Container[str]) -> list[nn.Module]:
    """The modules that directly hold the parameters of these names."""
    return [
        module
        for path, module in model.named_modules()
        if any(f"{path}.{name}".removeprefix(".") in names for name in module._parameters)
    ]


@contextmanager
def at_hand(modules: Iterable[nn.Module], write: bool = False) -> Iterator[None]:
    """Load the own weights of ``modules`` for the time of the block; ``write`` keeps what the
    block writes to them. ValueError, before any is loaded, if a write cannot be kept (on disk)."""
    away = [module for module in dict.fromkeys(modules) if is_away(module)]
    if write:
        for module in away:
            _check_writable(module)
    for module in away:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in away:
            if write:
                _write_back(module)
            module._hf_hook.post_forward(module, None)


def _check_writable(module: nn.Module) -> None:
    held = _offloads(module).weights_map
    for name, parameter in module._parameters.items():
        # read from a file at each access
        if parameter is not None and held[name] is not held[name]:
            raise ValueError(
                f"{name} of a {type(module).__name__} is offloaded to disk and cannot be written"
                " there: accelerate.hooks.remove_hook_from_submodules(model) first"
            )


@torch.no_grad()
def _write_back(module: nn.Module) -> None:
    held = _offloads(module).weights_map
    for name, parameter in module._parameters.items():
        if parameter is not None and held[name].data_ptr() != parameter.data_ptr():
            held[name].copy_(parameter)


def wrappers(module: nn.Module) -> Iterator[Callable]:
    """The instance forward of a module and the forwards it wraps, the outermost first, as far as
    the wrappers declare them (``functools.wraps``, accelerate)."""
    found = module.__dict__.get("forward")
    for _ in range(64):  # a circular chain ends too
        if found is None:
            return
        yield found
        if isinstance(found, functools.partial) and found.func.__module__ == "accelerate.hooks":
            found = module.__dict__.get(INNER)
        else:
            found = getattr(found, "__wrapped__", None)
