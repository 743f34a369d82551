"""LoRA layers of PEFT: each forward becomes one ``lora_linear`` (docs/maths.md#i2), or
``lora_beside`` if the base is quantised and computes its own product.

A layer keeps its parameters, its dropout and its switches. PEFT's own forward still runs for
everything beyond plain LoRA (more than one adapter, DoRA, a merged or disabled adapter, a base that
is neither an ``nn.Linear`` nor quantised). Each call decides again.
"""

from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.injection.record import Injection
from pelt_fast.modules.projection_view import holds_numbers
from pelt_fast.modules.switch import ALWAYS_ON, Switch

# PEFT's classes of LoRA on a quantised layer: their forward is base(x) + s B A drop(x), as Linear's
QUANTISED = ("Linear4bit", "Linear8bitLt", "GPTQLoraLinear", "AwqLoraLinear", "AqlmLoraLinear",
             "EetqLoraLinear", "HqqLoraLinear", "TorchaoLoraLinear")  # fmt: skip


def _is_lora(layer: nn.Module) -> bool:
    """Whether a layer is PEFT's LoRA on a linear layer, quantised or not."""
    kind = type(layer)
    known = kind.__name__ in ("Linear", *QUANTISED)
    return known and kind.__module__.startswith("peft.tuners.lora.")


def accelerate_lora(peft_model: nn.Module, kind: str, injection: Injection) -> None:
    """Replace the forward of every LoRA layer; ValueError when no layer is plain LoRA."""
    layers = [module for module in peft_model.modules() if _is_lora(module)]
    reasons = {FusedLoRA(layer).why_not() for layer in layers}
    if not layers or None not in reasons:
        why = "; ".join(sorted(reasons - {None})) or f"it is a {kind} model without LoRA layers"
        raise ValueError(f"there is nothing to accelerate: {why}")
    for layer in layers:
        injection.changes.call(layer, FusedLoRA(layer, injection.switch))


class FusedLoRA:
    """The forward of one PEFT LoRA layer."""

    def __init__(self, layer: nn.Module, switch: Switch = ALWAYS_ON):
        self.layer, self.switch = layer, switch

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer = self.layer
        if self.switch.is_off():
            return layer.base_layer(x, *args)
        if args or any(value is not None for value in kwargs.values()) or self.why_not():
            return type(layer).forward(layer, x, *args, **kwargs)
        base, (name,) = layer.base_layer, self._active()
        factor_a, factor_b = layer.lora_A[name], layer.lora_B[name]
        scale, dropout = layer.scaling[name], layer.lora_dropout[name]
        factors = factor_a.weight, factor_b.weight
        settings = dict(scale=scale, dropout_p=getattr(dropout, "p", 0.0),
                        training=dropout.training)  # fmt: skip
        if self._is_quantised:
            return functional.lora_beside(x, base, *factors, **settings)
        bias = base.bias
        if factor_b.bias is not None:
            extra = (scale * factor_b.bias).to(base.weight.dtype)
            bias = extra if bias is None else bias + extra
        return functional.lora_linear(x, base.weight, bias, *factors, **settings)

    @property
    def _is_quantised(self) -> bool:
        """Whether the base computes its own product, because only it can read its weight."""
        return type(self.layer).__name__ in QUANTISED or not holds_numbers(self.layer.base_layer)

    def _active(self) -> list[str]:
        return [name for name in self.layer.active_adapters if name in self.layer.lora_A]

    def why_not(self) -> str | None:
        """Why PEFT's own forward runs now, or None."""
        layer, active = self.layer, self._active()
        if layer.disable_adapters or layer.merged:
            return "its adapters are disabled or merged"
        if len(active) != 1:
            return f"{len(active)} adapters are active"
        if active[0] in layer.lora_variant:
            return f"{type(layer.lora_variant[active[0]]).__name__} is not plain LoRA"
        if self._is_quantised:
            biased = layer.lora_B[active[0]].bias is not None
            return "its LoRA has a bias, and its base is quantised" if biased else None
        if type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
            return f"its base is a {type(layer.base_layer).__name__}"
        return None
