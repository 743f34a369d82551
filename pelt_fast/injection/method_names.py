"""The names of one method's parameters, where several methods are in one model."""

from torch import nn

from pelt_fast.layouts.names import parameters_of
from pelt_fast.modules.frozen_module import OWN


def plain_name(name: str, method: str) -> str | None:
    """The name that a parameter or module of ``method`` has where the method is alone in the model;
    None if it is no part of it."""
    steps = name.split(".")
    for i, step in enumerate(steps):
        if step.startswith("pelt_"):
            if steps[i + 1 : i + 2] != [method]:
                return None
            kept = steps[:i] if step == OWN else steps[: i + 1]
            return ".".join(kept + steps[i + 2 :])
    return None


def parameters_of_method(model: nn.Module, method: str) -> dict[str, nn.Parameter]:
    """The parameters of one method by the names that they have where it is alone."""
    named = ((plain_name(name, method), p) for name, p in parameters_of(model).items())
    return {name: parameter for name, parameter in named if name is not None}
