"""The layer of a task head that gives the classes. A method may have another number of them."""

import torch
from torch import Tensor, nn

from pelt_fast.config import PeltConfig
from pelt_fast.layouts.lookup import task_head
from pelt_fast.layouts.names import modules_of


def class_layer(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The linear layer that gives the logits of the classes, and its path; None if the model is no
    classifier."""
    if "Classification" not in type(model).__name__:
        return None
    head = {module for child in task_head(model).values() for module in child.modules()}
    found = [
        (path, module)
        for path, module in modules_of(model).items()
        if module in head and isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
    ]  # fmt: skip
    return found[-1] if found else None


def check_num_labels(model: nn.Module, name: str, config: PeltConfig, num_labels: int) -> None:
    """ValueError unless the method ``name`` can have a task head of so many classes."""
    if not isinstance(num_labels, int) or num_labels < 1:
        raise ValueError(f"num_labels of {name!r} must be a whole number >= 1, got {num_labels!r}")
    if class_layer(model) is None:
        raise ValueError(
            f"num_labels of {name!r} is {num_labels}, and {type(model).__name__} has no task head"
            " of classes"
        )
    if not config.train_head:
        raise ValueError(
            f"num_labels of {name!r} is {num_labels}, and its config says train_head=False: it has"
            " the model's own head"
        )


def new_class_tensors(model: nn.Module, num_labels: int) -> dict[str, Tensor]:
    """A class layer for so many classes, as transformers makes a new one, by parameter names."""
    path, layer = class_layer(model)
    deviation = getattr(model.config, "initializer_range", 0.02)
    weight = layer.weight.new_empty(num_labels, layer.in_features)
    tensors = {f"{path}.weight": torch.nn.init.normal_(weight, std=deviation)}
    if layer.bias is not None:
        tensors[f"{path}.bias"] = layer.bias.new_zeros(num_labels)
    return tensors


def other_num_labels(model: nn.Module, tensors: dict[str, Tensor]) -> int | None:
    """The number of classes of a method's tensors; None if it has those of the model."""
    found = class_layer(model)
    if found is None or f"{found[0]}.weight" not in tensors:
        return None
    count = tensors[f"{found[0]}.weight"].shape[0]
    return None if count == model.config.num_labels else count
