"""disabled: a block in which the base alone answers."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel

from pelt_fast.layouts.names import compiled_from, is_method, parameters_of, unwrapped
from pelt_fast.modules import ParallelFFNAdapter
from pelt_fast.modules.base_parameters import BaseParameters, Before, in_own_memory
from pelt_fast.modules.hooked import HOOK, holder_of
from pelt_fast.modules.projection_view import parameter_of

from .handles import PEFT, carrier_of
from .record import Injection, injection_of


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """A block in which the base alone answers, bit for bit: the model from before inject.

    The method stays in the model. It acts again after the block, and meanwhile in the forwards of
    other threads. Blocks may be nested. The task head and biases that train have their values from
    before the method. A checkpoint that begins in the block runs again in backward without the
    method. Compiled models run eagerly while a block lasts.

    Args:
        model: a model with a method, a wrapper of one, or a PEFT model after ``accelerate_peft``.

    Returns:
        A context manager that gives ``model``.

    Raises:
        ValueError: nothing was injected; the base is not there any more (full fine-tuning, a merged
            method, a parameter of the base that was made trainable after inject); or the model is a
            DataParallel on several devices, whose threads do not see the block.

    Example:
        with torch.no_grad(), pelt_fast.disabled(model):
            reference = model(**batch).logits
    """
    carrier, injection = _injected(model)
    _check(model, carrier, injection)
    with injection.switch.turned_off(lambda: _base_parameters(carrier, injection)):
        yield model


def refuse_disabled(injection: Injection, call: str) -> None:
    """RuntimeError for a call that changes a method while it is switched off."""
    if injection.switch.any_block:
        raise RuntimeError(f"{call} in a block of disabled(model): leave the block first")


def _injected(model: nn.Module) -> tuple[nn.Module, Injection]:
    inner = compiled_from(model) if isinstance(model, nn.Module) else model
    if isinstance(inner, nn.Module) and PEFT in inner.__dict__:
        return inner, inner.__dict__[PEFT]
    carrier = carrier_of(model)
    return carrier, injection_of(carrier)


def _check(handle: nn.Module, carrier: nn.Module, injection: Injection) -> None:
    name = injection.config.name
    if injection.config.is_full:
        raise ValueError("full fine-tuning trains the base itself: there is none to answer alone")
    if injection.merged:
        raise ValueError(f"{name!r} is merged into the base: unmerge it first")
    if isinstance(handle, DataParallel) and len(handle.device_ids) > 1:
        raise ValueError(
            "DataParallel runs the model in threads of its own, which do not see this block: use"
            " DistributedDataParallel"
        )
    if PEFT in carrier.__dict__:
        _check_peft(carrier, injection)
        return
    known = injection.before.trained
    for path, parameter in parameters_of(carrier).items():
        if parameter.requires_grad and not is_method(path) and path not in known:
            raise ValueError(
                f"{path} trains and is no part of {name!r}: its value from before is not kept"
            )


def _check_peft(peft_model: nn.Module, injection: Injection) -> None:
    """ValueError where PEFT itself runs a part of its method."""
    ours = injection.changes.forwards()
    for path, module in peft_model.named_modules():
        tuned = {"base_layer", "original_module"} & module._modules.keys()
        if tuned and module not in ours:
            raise ValueError(
                f"{path} is a {type(module).__name__} that PEFT runs itself: use"
                " model.disable_adapter()"
            )
        if getattr(module, "merged_adapters", None):
            raise ValueError(f"{path} is merged into the base: unmerge it first")
    for path, parameter in unwrapped(peft_model).named_parameters():
        if parameter.requires_grad and ".lora_" not in path:
            raise ValueError(f"{path} trains, and its value from before is not kept")


def _base_parameters(model: nn.Module, injection: Injection) -> list[BaseParameters]:
    """What the modules have in the block whose parameters are not as the base had them: those that
    train, and those that are packed with a method's."""
    found: dict[nn.Module, BaseParameters] = {}

    def instead(module: nn.Module, name: str, value) -> None:
        if module not in found:
            found[module] = BaseParameters(module, injection.switch.is_off)
        found[module].instead[name] = value

    named, before = parameters_of(model), injection.before.trained
    values = {named[name]: value for name, value in before.items() if name in named}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter in values:
                instead(module, name, Before(values[parameter], HOOK in module.__dict__))
    for site in injection.sites:
        if isinstance(site.module, ParallelFFNAdapter):
            for projection in site.module.ffn.projections:
                if parameter_of(projection.module) is not None:
                    instead(holder_of(projection.module), "weight", in_own_memory)
    return list(found.values())
