"""Named methods that are in one model at the same time."""

import torch
from torch import Tensor, nn

from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.inject_together import TogetherInjection, inject_together
from pelt_fast.injection.method_names import parameters_of_method, plain_name
from pelt_fast.injection.record import injection_of
from pelt_fast.layouts.layout import Layout
from pelt_fast.layouts.names import modules_of
from pelt_fast.modules import PrefixBank
from pelt_fast.modules.routing import Routes

from .method_sum import Kept


def are_together(model: nn.Module) -> bool:
    """Whether several methods are in ``model`` at the same time."""
    return isinstance(injection_of(carrier_of(model)), TogetherInjection)


def put_together(model: nn.Module, kept: dict[str, Kept], layout: Layout | None) -> None:
    """Put methods into ``model`` with their tensors. The first one is active."""
    for name in kept:
        _check_name(name)
    injection = inject_together(model, {name: k.config for name, k in kept.items()}, layout)
    for name, method in kept.items():
        fill(model, name, method.trained)
    injection.routing.default = _all_rows(injection, next(iter(kept)))


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
