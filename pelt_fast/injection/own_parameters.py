"""The task head and the biases of one of several methods, beside those of the base."""

from torch import nn

from pelt_fast.config import PeltConfig
from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.names import is_method, parameters_of
from pelt_fast.modules.frozen_module import OWN
from pelt_fast.modules.own_parameters import OwnParameters

from .class_layer import new_class_tensors
from .trained_names import bias_names, head_names


def add_own_parameters(
    model: nn.Module,
    config: PeltConfig,
    stacks: list[StackLayout],
    injection,
    num_labels: int | None,
) -> list[str]:
    """Give the method that is built now its own copy of the parameters of the base that it trains,
    and a new class layer if it has another number of classes. Returns their names."""
    names = head_names(model) if config.train_head else []
    for modification in config.modifications:
        if modification.form == "bias":
            names += bias_names(model, modification, stacks)
    names = [name for name in dict.fromkeys(names) if not is_method(name)]  # of other methods
    parameters = parameters_of(model)
    wanted = {parameters[name]: parameters[name] for name in names}
    if num_labels is not None:
        new = new_class_tensors(model, num_labels)
        wanted |= {parameters[name]: tensor for name, tensor in new.items()}
    for module in list(model.modules()):
        values = {n: wanted[p] for n, p in module._parameters.items() if p in wanted}
        if values:
            injection.changes.add(module, OWN, OwnParameters(values))
            injection.changes.share(module)
    return names
