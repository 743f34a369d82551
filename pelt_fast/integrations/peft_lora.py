"""LoRA layers of PEFT: each forward becomes one ``lora_linear`` (docs/maths.md#i2).

A layer keeps its parameters, its dropout and its switches. PEFT's own forward still runs for
everything beyond plain LoRA (more than one adapter, DoRA, a merged or disabled adapter, a base that
is not an ``nn.Linear``). Each call decides again.
"""

from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.injection.record import Injection
from pelt_fast.modules.switch import ALWAYS_ON, Switch


def accelerate_lora(peft_model: nn.Module, kind: str, injection: Injection) -> None:
    """Replace the forward of every LoRA layer; ValueError when no layer is plain LoRA."""
    from peft.tuners.lora.layer import Linear

    layers = [module for module in peft_model.modules() if type(module) is Linear]
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
        scale, dropout, bias = layer.scaling[name], layer.lora_dropout[name], base.bias
        if factor_b.bias is not None:
            extra = (scale * factor_b.bias).to(base.weight.dtype)
            bias = extra if bias is None else bias + extra
        return functional.lora_linear(
            x, base.weight, bias, factor_a.weight, factor_b.weight, scale=scale,
            dropout_p=getattr(dropout, "p", 0.0), training=dropout.training,
        )  # fmt: skip

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
        if type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
            return f"its base is a {type(layer.base_layer).__name__}"
        return None
