"""accelerate_peft: a model made by PEFT runs our Functions, with its own modules, names and files.

A LoRA layer keeps its parameters, its dropout and its switches; its forward becomes one
``lora_linear``. Whatever PEFT does beyond plain LoRA (several adapters at once, DoRA, a merged or
disabled adapter, a base that is not an ``nn.Linear``) runs PEFT's own forward: each call decides.
A prefix reaches the attentions through ``prefix_attention`` instead of the cache: nothing is copied
for each batch row, causal stays causal, gradient checkpointing works.
"""

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.config import PeltConfig
from pelt_fast.injection import attention_interface as attention
from pelt_fast.injection.own_configs import own_configs, return_configs
from pelt_fast.injection.record import Injection
from pelt_fast.injection.targets import places
from pelt_fast.injection.watch import check_free, watch
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from pelt_fast.modules.per_thread import PerThread
from pelt_fast.modules.prefix_run import PrefixRuns

from .known_cache import mark_known, refuse_unknown

_STATE = "_pelt_peft"


def accelerate_peft(peft_model: nn.Module) -> nn.Module:
    """Let a PEFT LoRA or prefix model run fused, in place; returns it.

    Outputs and gradients are PEFT's to rounding; with dropout on, of the same distribution, each
    module its own mask. LoRA: rank-stabilised scale, biases, any target. Prefix: causal language
    models of the architecture table; a cache that PEFT filled before is refused. Raises TypeError
    when it is not a PEFT model, ValueError when there is nothing to accelerate or it was done
    already.
    """
    kind = _peft_type(peft_model)
    if hasattr(peft_model, _STATE):
        raise ValueError("this PEFT model is accelerated already")
    injection = Injection(PeltConfig("peft"))
    if kind == "PREFIX_TUNING":
        _accelerate_prefix(peft_model, injection)
    else:
        _accelerate_lora(peft_model, kind, injection)
    watch(peft_model.get_base_model(), [], injection)
    object.__setattr__(peft_model, _STATE, injection)
    return peft_model


def restore_peft(peft_model: nn.Module) -> nn.Module:
    """Take :func:`accelerate_peft` back; returns the PEFT model. ValueError when it was not
    done."""
    injection = peft_model.__dict__.get(_STATE)
    if injection is None:
        raise ValueError("this model was not accelerated: call accelerate_peft first")
    check_free(peft_model, injection)
    return_configs(injection)
    injection.changes.undo()
    delattr(peft_model, _STATE)
    return peft_model


def _peft_type(model: nn.Module) -> str:
    try:
        from peft import PeftModel
    except ImportError:
        raise TypeError("accelerate_peft takes a PEFT model, and peft is not installed") from None
    if not isinstance(model, PeftModel):
        raise TypeError(f"accelerate_peft takes a peft.PeftModel, got {type(model).__name__}")
    return str(getattr(model.active_peft_config.peft_type, "value", ""))


def _accelerate_lora(peft_model: nn.Module, kind: str, injection: Injection) -> None:
    from peft.tuners.lora.layer import Linear

    layers = [module for module in peft_model.modules() if type(module) is Linear]
    reasons = {FusedLoRA(layer).why_not() for layer in layers}
    if not layers or None not in reasons:
        found = "; ".join(sorted(reasons - {None})) or f"it is a {kind} model without LoRA layers"
        raise ValueError(f"there is nothing to accelerate: {found}")
    for layer in layers:
        injection.changes.call(layer, FusedLoRA(layer))


class FusedLoRA:
    """The forward of one PEFT LoRA layer."""

    def __init__(self, layer: nn.Module):
        self.layer = layer

    def __call__(self, x: Tensor, *args, **kwargs) -> Tensor:
        layer = self.layer
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


def _accelerate_prefix(peft_model: nn.Module, injection: Injection) -> None:
    model = peft_model.get_base_model()
    stacks = stacks_of(model)
    if len(stacks) != 1 or stacks[0].kind != "decoder":
        raise ValueError(
            f"PEFT's prefix on {type(model).__name__} is not accelerated: causal language models"
            " are (inject(model, 'prefix') reaches encoders as well)"
        )
    base, bank = base_of(model), PeftPrefix(peft_model)
    layout = [
        (place, attention_layout)
        for place in places(base, stacks)
        for attention_layout in place.stack.attentions
    ]
    for place, attention_layout in layout:
        attention.wrapping(find(place.layer, attention_layout.module).config._attn_implementation)
    own_configs(model, injection)
    for place, attention_layout in layout:
        module = find(place.layer, attention_layout.module)
        injection.changes.set(module, attention.SLICE, PeftSlice(bank, place.index))
        attention.wrap(module, injection)
    owner = find(base, stacks[0].owner)
    injection.changes.hook(owner.register_forward_pre_hook(attention.still_wrapped))
    injection.changes.hook(owner.register_forward_pre_hook(bank.before_decoder, with_kwargs=True))
    injection.changes.hook(owner.register_forward_hook(bank.after_decoder))
    injection.changes.set(peft_model, "forward", bank.forward)
    injection.changes.set(peft_model, "generate", bank.generate)


class PeftPrefix:
    """PEFT's prefix encoder as a bank of keys and values, at work while the PEFT model runs."""

    def __init__(self, peft_model: nn.Module):
        self.peft_model = peft_model
        self._entering = PerThread()  # whether the PEFT model's own forward is running
        self.runs = PrefixRuns()

    @property
    def length(self) -> int:
        """P."""
        return self.peft_model.active_peft_config.num_virtual_tokens

    def values(self) -> Tensor:
        """Keys and values (L, 2, Hkv, P, D), once for the whole batch."""
        model, config = self.peft_model, self.peft_model.active_peft_config
        encoder = model.prompt_encoder[model.active_adapter]
        if config.inference_mode:
            flat = encoder.embedding.weight
        else:
            tokens = model.prompt_tokens[model.active_adapter][: self.length]
            flat = encoder(tokens.to(encoder.embedding.weight.device))
        heads = config.num_attention_heads
        shape = (self.length, config.num_layers, 2, heads, config.token_dim // heads)
        return flat.view(shape).permute(1, 2, 3, 0, 4)

    def before_decoder(self, module: nn.Module, args: tuple, kwargs: dict):
        """The prefix of this forward; positions that begin behind it, as PEFT counts them."""
        entering = self._entering.get()
        self.runs.begin(self.values() if entering else None)
        if not entering:
            return None
        names = ("input_ids", "attention_mask", "position_ids")
        kwargs = {**dict(zip(names, args)), **kwargs}
        refuse_unknown(kwargs)
        positions = kwargs.get("position_ids")
        if positions is None:
            given = kwargs.get("inputs_embeds")
            given = kwargs["input_ids"] if given is None else given
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(past, past + given.shape[1], device=given.device)[None]
        return (), {**kwargs, "position_ids": positions + self.length}

    def after_decoder(self, *_) -> None:
        """The prefix of this forward is let go."""
        self.runs.end()

    def _run(self, function, *args, **kwargs):
        self._entering.put(True)
        try:
            return function(*args, **kwargs)
        finally:
            self._entering.put(None)

    def forward(self, *args, task_ids=None, **kwargs):
        """The PEFT model's forward: the base model's own, with the prefix at work."""
        return mark_known(self._run(self.peft_model.get_base_model(), *args, **kwargs))

    def generate(self, *args, **kwargs):
        """The base model's own generate, with the prefix at work."""
        return self._run(self.peft_model.get_base_model().generate, *args, **kwargs)


class PeftSlice:
    """One attention's place in a :class:`PeftPrefix`."""

    form, composition = "softmax", "gated"

    def __init__(self, bank: PeftPrefix, index: int):
        self.bank, self.index = bank, index

    @property
    def on(self) -> bool:
        """Whether the prefix acts: not while PEFT has its adapters disabled."""
        run = self.bank.runs.now()
        return run is not None and run.values is not None

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D)."""
        return self.bank.runs.now().layer(self.index)
