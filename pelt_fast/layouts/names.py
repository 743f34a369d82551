"""The names of a model's parameters and modules, without those of wrappers."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_COMPILED = "_orig_mod"  # torch.compile's child


def compiled_from(module: nn.Module) -> nn.Module:
    """A module, or the one that torch.compile made it from."""
    while isinstance(module, nn.Module) and _COMPILED in module._modules:
        module = module._modules[_COMPILED]
    return module


def check_model(model: nn.Module) -> None:
    """TypeError where ``model`` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind torch.compile, DDP, DataParallel and PEFT."""
    check_model(model)
    while True:
        inner = compiled_from(model)
        if isinstance(inner, (DistributedDataParallel, DataParallel)):
            inner = inner.module
        elif hasattr(type(inner), "get_base_model"):  # PEFT's
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


def clean(name: str) -> str:
    """A name without the steps that torch.compile adds."""
    return name.replace(f"{_COMPILED}.", "").removesuffix(f".{_COMPILED}")


def is_method(name: str) -> bool:
    """Whether a parameter's name belongs to an injected site."""
    return any(step.startswith("pelt_") for step in name.split("."))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in the plain model, whether layers are compiled or not."""
    return {clean(name): parameter for name, parameter in model.named_parameters()}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names in the plain model."""
    return {clean(name): module for name, module in model.named_modules()
            if _COMPILED not in module._modules}  # fmt: skip
