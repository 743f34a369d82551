"""A method's tensors by name: read from a model, checked against it, and written into it."""

import torch
from torch import Tensor, nn

from pelt_fast.injection.handles import carrier_of
from pelt_fast.injection.method_names import plain_name
from pelt_fast.injection.record import Injection, injection_of
from pelt_fast.layouts.names import is_method, modules_of, parameters_of
from pelt_fast.modules import PrefixBank
from pelt_fast.modules.hooked import at_hand, holders

from .sharded import is_sharded, like, resharded, whole


def method_tensors(model: nn.Module, method: str | None = None) -> dict[str, Tensor]:
    """The method, prefixes as their keys and values (L, 2, H, P, D), and the trained task head. Of
    several methods that are in the model together, the one that is named."""
    model = carrier_of(model)
    injection = injection_of(model)
    if method is not None:
        named = _method_tensors(model, injection).items()
        plain = {plain_name(name, method): tensor for name, tensor in named}
        return {name: tensor for name, tensor in plain.items() if name is not None}
    names = {name for name, _ in model.named_parameters()}
    if not injection.config.is_full:
        names = {name for name in names if is_method(name) or name in injection.own_trained}
    with at_hand(holders(model, names)):
        return _method_tensors(model, injection)


def _method_tensors(model: nn.Module, injection: Injection) -> dict[str, Tensor]:
    if injection.config.is_full:
        return {name: whole(p) for name, p in parameters_of(model).items()}
    trained = injection.own_trained
    banks = {name: m for name, m in modules_of(model).items() if isinstance(m, PrefixBank)}
    tensors = {f"{name}.prefix": _keys_and_values(bank) for name, bank in banks.items()}
    for name, parameter in parameters_of(model).items():
        in_bank = any(name.startswith(f"{bank}.") for bank in banks)
        if name in trained or (is_method(name) and not in_bank):
            tensors[name] = whole(parameter)
    return tensors


def _keys_and_values(bank: PrefixBank) -> Tensor:
    if not is_sharded(bank):
        return bank().detach()
    parameters = {name: whole(parameter) for name, parameter in bank.named_parameters()}
    return torch.func.functional_call(bank, parameters, ()).detach()


def fold_banks(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace the MLP of each prefix by its keys and values, where ``tensors`` has those."""
    for name, module in modules_of(model).items():
        if isinstance(module, PrefixBank) and f"{name}.prefix" in tensors:
            module.fold(tensors[f"{name}.prefix"])


def check_fits(expected: dict[str, Tensor], tensors: dict[str, Tensor], folder) -> None:
    """ValueError unless names and shapes are those expected."""
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"the method in {folder} does not fit this model: it lacks"
            f" {', '.join(sorted(missing)[:3]) or 'nothing'} and has no use for"
            f" {', '.join(sorted(unexpected)[:3]) or 'nothing'}{_hint(missing | unexpected)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} in {folder} has shape {tuple(tensor.shape)},"
                f" the model wants {tuple(expected[name].shape)}{_hint({name})}"
            )


def _hint(names: set[str]) -> str:
    """A hint for names that are not a site's: they may be a task head's."""
    if any(is_method(name) for name in names):
        return ""
    return ". Is it another task head? load(..., head=False) leaves the saved one out"


@torch.no_grad()
def copy_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write tensors into the parameters of their names, in place."""
    resharded(model)
    with at_hand(holders(model, tensors), write=True):
        parameters = parameters_of(model)
        for name, tensor in tensors.items():
            parameters[name].copy_(like(parameters[name], tensor))
