"""Which of the model's own parameters train: the task head's, and the biases of BitFit."""

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import base_of, task_head
from pelt_fast.layouts.names import parameters_of


def head_names(model: nn.Module) -> list[str]:
    """Names of the task head's parameters. One that is also used outside of it is the base's."""
    if not hasattr(model, "config"):
        return []  # no model of transformers: nobody says which part is a head
    inside = {module for child in task_head(model).values() for module in child.modules()}
    outside = {p for m in model.modules() if m not in inside for p in m._parameters.values()}
    head = {p for module in inside for p in module._parameters.values()} - outside
    return [name for name, parameter in parameters_of(model).items() if parameter in head]


def bias_names(
    model: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> list[str]:
    """Names, in ``model``, of the base's bias vectors in the target stacks."""
    owners = [stack.owner for stack in stacks if stack.kind in modification.where]
    names = {parameter: name for name, parameter in parameters_of(model).items()}
    return [
        names[parameter]
        for name, parameter in parameters_of(base_of(model)).items()
        if name.split(".")[-1] == "bias" and any(_is_in(name, owner, stacks) for owner in owners)
    ]


def _is_in(name: str, owner: str, stacks: list[StackLayout]) -> bool:
    """Whether a parameter is ``owner``'s. With one stack, all of the base model's are."""
    return len(stacks) == 1 or not owner or name.startswith(f"{owner}.")
