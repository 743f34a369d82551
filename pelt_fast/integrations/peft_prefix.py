"""PEFT's prefix, given to the attentions through ``prefix_attention`` instead of the cache.

Nothing is copied for each row of a batch, causal attention stays causal, and gradient checkpointing
works (docs/maths.md#i4).
"""

import torch
from torch import Tensor, nn

from pelt_fast.injection import attention_interface as attention
from pelt_fast.injection.own_configs import own_configs
from pelt_fast.injection.record import Injection
from pelt_fast.injection.targets import target_layers
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from pelt_fast.modules.per_thread import PerThread
from pelt_fast.modules.prefix_run import AttentionSlice, PrefixRuns
from pelt_fast.modules.switch import Switch

from .known_cache import mark_known, refuse_unknown


def accelerate_prefix(peft_model: nn.Module, injection: Injection) -> None:
    """Give the prefix to every attention of a causal language model; ValueError for another."""
    model = peft_model.get_base_model()
    stacks = stacks_of(model)
    if len(stacks) != 1 or stacks[0].kind != "decoder":
        raise ValueError(
            f"PEFT's prefix on {type(model).__name__} is not accelerated: causal language models"
            " are (inject(model, 'prefix') reaches encoders as well)"
        )
    base, bank = base_of(model), PeftPrefix(peft_model, injection.switch)
    modules = [
        (find(target.layer, layout.module), target.index)
        for target in target_layers(base, stacks)
        for layout in target.stack.attentions
    ]
    for module, _ in modules:
        attention.wrapping(module.config._attn_implementation)  # refused before anything is changed
    own_configs(model, injection)
    for module, index in modules:
        injection.changes.set(module, attention.SLICE, PeftSlice(bank, index))
        attention.wrap(module, injection)
    owner = find(base, stacks[0].owner)
    injection.changes.hook(owner.register_forward_pre_hook(attention.still_wrapped))
    injection.changes.hook(owner.register_forward_pre_hook(bank.before_decoder, with_kwargs=True))
    injection.changes.hook(owner.register_forward_hook(bank.after_decoder, always_call=True))
    injection.changes.set(peft_model, "forward", bank.forward)
    injection.changes.set(peft_model, "generate", bank.generate)


class PeftPrefix:
    """The keys and values of PEFT's prefix encoder. They act while the PEFT model runs."""

    def __init__(self, peft_model: nn.Module, switch: Switch):
        self.peft_model, self.switch = peft_model, switch
        self._entering = PerThread()  # whether the PEFT model's own forward is running
        self.runs = PrefixRuns()

    @property
    def length(self) -> int:
        """P."""
        return self.peft_model.active_peft_config.num_virtual_tokens

    def values(self) -> Tensor:
        """Keys and values (L, 2, Hkv, P, D), one for the whole batch."""
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
        """Compute this forward's prefix. Positions begin after it, as PEFT counts them."""
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
        """Free this forward's prefix."""
        self.runs.end()

    def _run(self, function, *args, **kwargs):
        if self.switch.is_off():
            return function(*args, **kwargs)
        self._entering.put(True)
        try:
            return function(*args, **kwargs)
        finally:
            self._entering.put(None)

    def forward(self, *args, task_ids=None, **kwargs):
        """Run as the PEFT model's forward: the base model's own, with the prefix."""
        return mark_known(self._run(self.peft_model.get_base_model(), *args, **kwargs))

    def generate(self, *args, **kwargs):
        """Run as the PEFT model's generate: the base model's own, with the prefix."""
        return self._run(self.peft_model.get_base_model().generate, *args, **kwargs)


class PeftSlice(AttentionSlice):
    """The keys and values of one attention in a :class:`PeftPrefix`."""

    def __init__(self, bank: PeftPrefix, index: int):
        self.bank, self.index = bank, index

    @property
    def on(self) -> bool:
        """Whether the prefix acts; it does not while PEFT has its adapters disabled."""
        run = self.bank.runs.now()
        return run is not None and run.values is not None

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D)."""
        return self.bank.runs.now().layer(self.index)
