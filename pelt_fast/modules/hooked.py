"""Modules under accelerate's hooks: a forward wrapped by one, weights that are away until it runs.

``dispatch_model``, ``cpu_offload`` and ``device_map`` put a wrapper on a module's instance
``forward`` and keep what was there as ``_old_forward``. An offloaded weight is on the meta device;
the hook brings it before the forward and lets it go after it.
"""

import functools
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

HOOK, INNER = "_hf_hook", "_old_forward"  # accelerate's names


def holder_of(module: nn.Module) -> nn.Module:
    """The module that holds the weight: of a part of a projection, its owner."""
    return module.__dict__.get("owner", module)


def forward_attribute_of(module: nn.Module) -> str:
    """The attribute that holds the module's own forward: inside of accelerate's wrapper, where
    there is one, so that the hook runs around whatever is put there."""
    hooked = HOOK in module.__dict__ and INNER in module.__dict__
    return INNER if hooked else "forward"


def put(module: nn.Module, forward: Callable) -> Callable | None:
    """Let ``module`` run ``forward`` when called, inside the hook it may have; what stood there."""
    attribute = forward_attribute_of(module)
    before = module.__dict__.get(attribute)
    setattr(module, attribute, forward)
    return before


def give_back(module: nn.Module, before: Callable | None, ours: Callable) -> None:
    """Put what was there before in the attribute of our forward, where that is now: accelerate's
    wrapper keeps it inside. A forward that is not ours and does not hold ours stays."""
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
    """Whether a weight of this module is offloaded now: not there unless its hook brings it."""
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
    """Where the hook brings the weights that are away."""
    return torch.device(_offloads(holder_of(module)).execution_device)


def run(module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
    """``forward`` as ``module``'s own, under the hook the module may have; as it is where that
    hook has brought the weights already."""
    hook = module.__dict__.get(HOOK)
    if hook is None or (_offloads(module) is not None and not is_away(module)):
        return forward(*args, **kwargs)
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, forward(*args, **kwargs))


def holders(model: nn.Module, names: Container[str]) -> list[nn.Module]:
    """The modules that hold the parameters of these names themselves."""
    return [
        module
        for path, module in model.named_modules()
        if any(f"{path}.{name}".removeprefix(".") in names for name in module._parameters)
    ]


@contextmanager
def at_hand(modules: Iterable[nn.Module], write: bool = False) -> Iterator[None]:
    """The own weights of ``modules`` brought for the time of the block; ``write`` keeps what is
    written there. ValueError, before anything is brought, where that cannot be kept (a disk)."""
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
        # made anew at each look: read from a file
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
    """The instance forward of a module, and what it wraps as far as it says so
    (``functools.wraps``, accelerate), the outermost first."""
    found = module.__dict__.get("forward")
    for _ in range(64):  # a chain that bites its tail ends too
        if found is None:
            return
        yield found
        if isinstance(found, functools.partial) and found.func.__module__ == "accelerate.hooks":
            found = module.__dict__.get(INNER)
        else:
            found = getattr(found, "__wrapped__", None)
