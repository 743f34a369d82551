"""accelerate_peft: a model made by PEFT runs our ops, and keeps its modules, names and files."""

from torch import nn

from pelt_fast.config import PeltConfig
from pelt_fast.injection.handles import PEFT
from pelt_fast.injection.own_configs import return_configs
from pelt_fast.injection.record import Injection
from pelt_fast.injection.repacking import keep_gradients
from pelt_fast.injection.watch import check_free, watch
from pelt_fast.layouts.names import check_model

from .peft_lora import accelerate_lora
from .peft_prefix import accelerate_prefix


def accelerate_peft(peft_model: nn.Module) -> nn.Module:
    """Let a LoRA or prefix model of PEFT run the fused ops, in place.

    Outputs and gradients are PEFT's up to rounding. With dropout they have the same distribution;
    each module draws its own mask. LoRA: rank-stabilised scale, biases, any target, plain or
    quantised layers. Prefix: causal language models of the architecture table. A cache that PEFT
    filled before is refused.

    Args:
        peft_model: a ``peft.PeftModel``.

    Returns:
        ``peft_model``.

    Raises:
        TypeError: it is not a PEFT model.
        ValueError: there is nothing to accelerate, or it was accelerated already.

    Example:
        peft_model = peft.get_peft_model(model, peft.LoraConfig())
        pelt_fast.accelerate_peft(peft_model)
    """
    kind = _peft_type(peft_model)
    if hasattr(peft_model, PEFT):
        raise ValueError("this PEFT model is accelerated already")
    injection = Injection(PeltConfig("peft"))
    if kind == "PREFIX_TUNING":
        accelerate_prefix(peft_model, injection)
    else:
        accelerate_lora(peft_model, kind, injection)
    keep_gradients(peft_model, injection.changes)
    watch(peft_model.get_base_model(), [], injection)
    object.__setattr__(peft_model, PEFT, injection)
    return peft_model


def restore_peft(peft_model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate_peft`.

    Args:
        peft_model: a model that was accelerated.

    Returns:
        ``peft_model``, which runs PEFT's own forwards again.

    Raises:
        ValueError: it was not accelerated.
        RuntimeError: another library's wrapper keeps one of our forwards inside.

    Example:
        pelt_fast.restore_peft(peft_model)
    """
    check_model(peft_model)
    injection = peft_model.__dict__.get(PEFT)
    if injection is None:
        raise ValueError("this model was not accelerated: call accelerate_peft first")
    check_free(peft_model, injection)
    return_configs(injection)
    injection.changes.undo()
    delattr(peft_model, PEFT)
    return peft_model


def _peft_type(model: nn.Module) -> str:
    try:
        from peft import PeftModel
    except ImportError:
        raise TypeError("accelerate_peft takes a PEFT model, and peft is not installed") from None
    if not isinstance(model, PeftModel):
        raise TypeError(f"accelerate_peft takes a peft.PeftModel, got {type(model).__name__}")
    return str(getattr(model.active_peft_config.peft_type, "value", ""))
