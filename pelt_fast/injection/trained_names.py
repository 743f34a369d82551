"""Which of the model's own parameters train: the task head's, and the biases of BitFit."""

from torch import nn
from transformers import PreTrainedModel

from pelt_fast.config import Modification
from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import base_of, find, task_head
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
    whole = bool(owners) and _is_one_stack(model, stacks)
    names = {parameter: name for name, parameter in parameters_of(model).items()}
    return [
        names[parameter]
        for name, parameter in parameters_of(base_of(model)).items()
        if name.split(".")[-1] == "bias" and (whole or any(_is_in(name, owner) for owner in owners))
    ]


def _is_one_stack(model: nn.Module, stacks: list[StackLayout]) -> bool:
    """Whether all of the base model belongs to one stack: it has no other one, and no model for
    images or sound beside its text model."""
    base = base_of(model)
    models = [m for m in base.modules() if isinstance(m, PreTrainedModel) and m is not base]
    whole = find(base, stacks[0].owner)
    beside = [m for m in models if whole not in m.modules() and m not in whole.modules()]
    return len({stack.layers for stack in stacks}) == 1 and not beside


def _is_in(name: str, owner: str) -> bool:
    """Whether a parameter is ``owner``'s."""
    return not owner or name.startswith(f"{owner}.")
