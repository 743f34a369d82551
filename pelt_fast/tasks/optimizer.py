"""The optimizer of a recipe: AdamW, with a rate and a decay for each group of parameters."""

import torch
from torch import nn

from .recipe import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """The trained parameters with their learning rate and decay. A prefix's reparameterisation
    gets ``prefix_rate`` of the rate; biases and LayerNorms get no decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = any(step.endswith("_prefix") for step in name.split("."))
            rate = recipe.learning_rate * (recipe.prefix_rate if slow else 1)
            decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": found, "lr": rate, "weight_decay": decay}
        for (rate, decay), found in groups.items()
    ]


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the :func:`parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, recipe), betas=recipe.adam_betas, eps=recipe.adam_epsilon
    )
