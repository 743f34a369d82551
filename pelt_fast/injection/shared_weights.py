"""One weight in two places: who holds a parameter, each module looked at once."""

from torch import nn

from pelt_fast.layouts.names import clean

Holders = dict[nn.Parameter, list[str]]


def holders_of(model: nn.Module) -> Holders:
    """For each parameter the names it has, one for each module that holds it: more than one where
    layers are tied, one where a layer is in two places."""
    found: Holders = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append(clean(f"{path}.{name}").lstrip("."))
    return found


def is_shared(holders: Holders, parameter: nn.Parameter | None) -> bool:
    """Whether more than one module holds it."""
    return len(holders.get(parameter, ())) > 1


def refuse_shared(holders: Holders, parameter: nn.Parameter) -> None:
    """ValueError when what a merge would write is read in another place, too."""
    first, *others = holders.get(parameter, [""])
    if others:
        raise ValueError(
            f"{first} is the same weight as {' and '.join(others)}: what is folded into one would"
            " change the other. Untie them (a clone each) before inject, or leave this unmerged"
        )
