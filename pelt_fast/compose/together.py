"""Named methods that are in one model at the same time."""

import os

import torch
from torch import Tensor, nn

from pelt_fast.config import PeltConfig
from pelt_fast.formats.checkpoint import read_method
from pelt_fast.injection.class_layer import other_num_labels
from pelt_fast.injection.disabled import refuse_disabled
from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.inject_together import (
    TogetherInjection,
    build_method,
    inject_together,
    remove_method,
    settle,
)
from pelt_fast.injection.method_names import parameters_of_method, plain_name
from pelt_fast.injection.record import injection_of
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.names import modules_of
from pelt_fast.modules import PrefixBank
from pelt_fast.modules.routing import Routes
from pelt_fast.presets import method as preset

from .method_sum import Kept


def are_together(model: nn.Module) -> bool:
    """Whether several methods are in ``model`` at the same time."""
    return isinstance(injection_of(carrier_of(model)), TogetherInjection)


def put_together(
    model: nn.Module,
    kept: dict[str, Kept],
    layout: Layout | None,
    num_labels: dict[str, int] | None = None,
) -> None:
    """Put methods into ``model`` with their tensors. The first one is active. ``num_labels``: of
    those that have another number of classes than the model."""
    for name in kept:
        _check_name(name)
    configs = {name: method.config for name, method in kept.items()}
    injection = inject_together(model, configs, layout, num_labels or {})
    for name, method in kept.items():
        fill(model, name, method.trained)
    if kept:
        injection.routing.default = _all_rows(injection, next(iter(kept)))


def add_method(
    model: nn.Module,
    name: str,
    method: str | PeltConfig | os.PathLike,
    *,
    num_labels: int | None = None,
) -> nn.Module:
    """Put one more named method into a model, beside those that are in it together.

    The others stay as they are, with what they learned; the base is not touched. The cost is the
    method's own tensors.

    Args:
        model: a model that :func:`pelt_fast.inject_named` was called on with ``together=True``.
        name: the new method's name, without a dot.
        method: a preset's name, a :class:`PeltConfig`, or the ``Path`` of a folder that
            :func:`pelt_fast.save` wrote.
        num_labels: the number of classes of the method's task head, as for
            :func:`pelt_fast.inject_named`. None: that of the saved head, or of the model.

    Returns:
        ``model``.

    Raises:
        ValueError: the name is in use, full fine-tuning, a method of another base, or what inject
            and load refuse. The model is unchanged.
        FileNotFoundError: a folder holds no saved method.

    Example:
        pelt_fast.add_method(model, "mail", Path("mail"))
    """
    carrier = carrier_of(model)
    injection = together_of(carrier)
    _check_name(name)
    refuse_disabled(injection, "add_method")
    if name in injection.methods:
        raise ValueError(f"a method is named {name!r} already: drop_method(model, {name!r}) first")
    config, tensors = _read(carrier, method)
    if config.is_full:
        raise ValueError(f"{name!r} is full fine-tuning, which leaves no base for the others")
    num_labels = classes_of(carrier, name, num_labels, tensors)
    with injection.routing.gate.changing():
        build_method(carrier, name, config, injection, num_labels)
        if tensors is not None:
            try:
                fill(carrier, name, tensors)
            except BaseException:
                remove_method(carrier, name, injection)
                raise
        settle(carrier, injection)
    return model


def classes_of(
    model: nn.Module, name: str, num_labels: int | None, tensors: dict[str, Tensor] | None
) -> int | None:
    """The number of classes of a method, if it is not the model's. ValueError if its saved tensors
    have another one than what was asked for."""
    own = getattr(getattr(model, "config", None), "num_labels", None)
    saved = None if tensors is None else other_num_labels(model, tensors)
    if num_labels is None or tensors is None:
        return saved if num_labels in (None, own) else num_labels
    if num_labels != (own if saved is None else saved):
        raise ValueError(
            f"num_labels of {name!r} is {num_labels}, and its saved task head is of {saved or own}"
        )
    return saved


def drop_method(model: nn.Module, name: str) -> nn.Module:
    """Take one named method out of a model; the others stay as they are.

    Args:
        model: a model that :func:`pelt_fast.inject_named` was called on with ``together=True``.
        name: the method's name. It must not be the active one.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown name, the active method, or one that this thread's routes name.

    Example:
        pelt_fast.drop_method(model, "mail")
    """
    carrier = carrier_of(model)
    injection = together_of(carrier)
    refuse_disabled(injection, "drop_method")
    number = injection.routing.ids[injection.known(name)]
    if injection.active == name:
        raise ValueError(f"{name!r} is the active method: set_active chooses another one first")
    routes = injection.routing.get()
    if routes is not None and bool((routes.methods == number).any()):
        raise ValueError(f"the routes in force name {name!r}: route(model, None) first")
    with injection.routing.gate.changing():
        remove_method(carrier, name, injection)
    return model


def together_of(model: nn.Module) -> TogetherInjection:
    """The injection of methods that are in ``model`` together; ValueError if they are not."""
    injection = injection_of(carrier_of(model))
    if not isinstance(injection, TogetherInjection):
        raise ValueError(
            f"this {type(carrier_of(model)).__name__} has one method at a time: use"
            " inject_named(model, methods, together=True)"
        )
    return injection


def _read(model: nn.Module, method) -> tuple[PeltConfig, dict[str, Tensor] | None]:
    """The config of a method, and its tensors if it is saved."""
    if isinstance(method, os.PathLike):
        return read_method(model, method)
    config = preset(method) if isinstance(method, str) else method
    if not isinstance(config, PeltConfig):
        kind = type(method).__name__
        raise TypeError(f"method must be a name, a PeltConfig or a Path, got {kind}")
    return config, None


def activate_together(model: nn.Module, name: str | None) -> None:
    """Make one method act on all rows where no route says otherwise."""
    if name is None:
        raise ValueError(
            "a sum of methods is one method of its own: it needs inject_named without together=True"
        )
    injection = injection_of(carrier_of(model))
    injection.routing.default = _all_rows(injection, name)


@torch.no_grad()
def fill(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Write a method's tensors into its sites."""
    for path, module in modules_of(model).items():
        plain = plain_name(path, name) if isinstance(module, PrefixBank) else None
        if plain is not None and f"{plain}.prefix" in tensors and module.prefix is None:
            module.fold(tensors[f"{plain}.prefix"])
    for plain, parameter in parameters_of_method(model, name).items():
        parameter.copy_(tensors[plain])


def _all_rows(injection: TogetherInjection, name: str) -> Routes:
    return Routes(torch.tensor([injection.routing.ids[name]]))


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"a method's name must be text without a dot, got {name!r}")
