"""Weights that more than one module holds."""

from torch import nn

from pelt_fast.layouts.names import clean

Holders = dict[nn.Parameter, list[str]]


def holders_of(model: nn.Module) -> Holders:
    """The names of each parameter, one for each module that holds it. There are several where
    weights are tied, and one where a layer is in the model twice."""
    holders: Holders = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append(clean(f"{path}.{name}").lstrip("."))
    return holders


def is_shared(holders: Holders, parameter: nn.Parameter | None) -> bool:
    """Whether more than one module holds it."""
    return len(holders.get(parameter, ())) > 1


def refuse_shared(holders: Holders, parameter: nn.Parameter) -> None:
    """ValueError when another module reads the weight that a merge would write."""
    first, *others = holders.get(parameter, [""])
    if others:
        raise ValueError(
            f"{first} is the same weight as {' and '.join(others)}: what is folded into one would"
            " change the other. Untie them (a clone each) before inject, or leave this unmerged"
        )
