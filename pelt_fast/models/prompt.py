"""How a prompt gets in front of a stack, and what it moves: masks, positions, outputs, the cache.

Nothing a caller hands in or gets back changes its length, but for what an encoder hands its
decoder: token outputs, logits and labels stay aligned with the input ids, and the first token is
the one that is pooled. The virtual tokens are visible to every token, padded left or right. They
take no learned positions (as in the paper's code); under rotary ones, which are relative, they take
the first P and the tokens follow. With a cache they are put in front once, when it is empty.
"""

import torch
from torch import Tensor, nn
from transformers import StaticCache

from pelt_fast.modules import Prompt
from pelt_fast.modules.slot import Slot

from .slots import StackSlot, find
from .takeover import Takeover


def attach_prompt(base: nn.Module, stack: StackSlot, prompt: Prompt, takeover: Takeover) -> None:
    """Register the hooks that put ``prompt`` in front of ``stack``."""
    owner, slot = find(base, stack.owner), stack.prompt
    if slot.norm is not None:
        front = NormFront(prompt)
        takeover.hook(base.register_forward_pre_hook(front.extend_mask, with_kwargs=True))
        norm = find(base, slot.norm)
        takeover.hook(norm.register_forward_pre_hook(front.prepend))
        takeover.hook(find(base, slot.strip).register_forward_hook(front.strip_last))
        takeover.hook(base.register_forward_hook(front.strip_hidden))
    elif stack.kind == "encoder":
        positions = None if slot.positions is None else find(base, slot.positions)
        front = EncoderFront(prompt, owner, positions)
        takeover.hook(owner.register_forward_pre_hook(front.before_encoder, with_kwargs=True))
        if positions is not None:
            takeover.call(positions, front.learned_positions)
        if hasattr(base, "decoder"):
            decoder = base.decoder
            hook = decoder.register_forward_pre_hook(front.before_decoder, with_kwargs=True)
            takeover.hook(hook)
    else:
        front = DecoderFront(prompt)
        takeover.hook(owner.register_forward_pre_hook(front.before, with_kwargs=True))
        takeover.hook(owner.register_forward_hook(front.after))


def widened(mask: Tensor | None, length: int) -> Tensor | None:
    """A padding mask (B, T) with ``length`` visible places in front; None stays None."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(
            f"prompt tuning takes an attention_mask of shape (batch, tokens), got"
            f" {tuple(mask.shape)}"
        )
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)


def _stripped(outputs, length: int, whole: int):
    """``hidden_states`` of an output without the virtual tokens, where it carries them."""
    states = outputs.get("hidden_states") if hasattr(outputs, "get") else None
    if states:
        outputs["hidden_states"] = tuple(
            h[:, length:] if h is not None and h.shape[1] == whole else h for h in states
        )
    return outputs


class NormFront:
    """In front of the LayerNorm of summed embeddings (BERT)."""

    def __init__(self, prompt: Prompt):
        self.prompt, self.whole = prompt, 0

    def extend_mask(self, module, args, kwargs):
        """Before the model: a mask that covers the prompt."""
        if len(args) > 1:  # (input_ids, attention_mask, ...)
            args = (args[0], widened(args[1], self.prompt.length), *args[2:])
        elif kwargs.get("attention_mask") is not None:
            mask = widened(kwargs["attention_mask"], self.prompt.length)
            kwargs = {**kwargs, "attention_mask": mask}
        return args, kwargs

    def prepend(self, module, args):
        """Before the LayerNorm."""
        x = self.prompt(args[0])
        self.whole = x.shape[1]
        return (x, *args[1:])

    def strip_last(self, module, args, outputs):
        """After the layers: the tokens' own outputs, the first of them first."""
        length = self.prompt.length
        if isinstance(outputs, tuple):
            return outputs[0][:, length:], *outputs[1:]
        outputs["last_hidden_state"] = outputs.last_hidden_state[:, length:]
        return outputs

    def strip_hidden(self, module, args, outputs):
        """After the model."""
        return _stripped(outputs, self.prompt.length, self.whole)


class EncoderFront:
    """In front of an encoder's token embeddings, whose decoder attends to the prompt too (BART,
    T5)."""

    def __init__(self, prompt: Prompt, encoder: nn.Module, positions: nn.Module | None):
        self.prompt, self.encoder = prompt, encoder
        self.positions = None if positions is None else Slot(positions)

    def before_encoder(self, module, args, kwargs):
        """Before the encoder: embeddings with the prompt in front, a mask that covers it."""
        names = ("input_ids", "attention_mask", "inputs_embeds")
        kwargs = {**dict(zip(names, args)), **kwargs}
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = self.encoder.embed_tokens(kwargs["input_ids"])
        mask = widened(kwargs.get("attention_mask"), self.prompt.length)
        given = dict(input_ids=None, inputs_embeds=self.prompt(embeds), attention_mask=mask)
        return (), {**kwargs, **given}

    def learned_positions(self, ids: Tensor, *args, **kwargs) -> Tensor:
        """The positions module: the tokens', and none for the prompt."""
        length = self.prompt.length
        found = self.positions(ids[:, length:], *args, **kwargs)
        return torch.cat([found.new_zeros(*found.shape[:-2], length, found.shape[-1]), found], -2)

    def before_decoder(self, module, args, kwargs):
        """Before the decoder: a cross-attention mask that covers what the encoder returned."""
        mask, states = (
            kwargs.get(name) for name in ("encoder_attention_mask", "encoder_hidden_states")
        )
        if mask is not None and states is not None:
            missing = states.shape[1] - mask.shape[1]
            if missing == self.prompt.length:
                kwargs = {**kwargs, "encoder_attention_mask": widened(mask, missing)}
        return args, kwargs


def _refuse_packed(mask: Tensor | None, positions: Tensor | None) -> None:
    """ValueError for a row that holds several sequences: one prompt in front of it would be the
    first one's alone."""
    if mask is not None or positions is None or torch.compiler.is_compiling():
        return
    if (positions.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids start again within a row: prompt tuning cannot take packed sequences (a"
            " prompt stands in front of a row). Pad them, or use a prefix, which each of them sees"
        )


class DecoderFront:
    """In front of a causal decoder's token embeddings (Llama)."""

    def __init__(self, prompt: Prompt):
        self.prompt, self.whole = prompt, None

    def before(self, model, args, kwargs):
        """Before the decoder: the prompt where the cache is empty, and everywhere its places."""
        names = ("input_ids", "attention_mask", "position_ids")
        kwargs = {**dict(zip(names, args)), **kwargs}
        length = self.prompt.length
        _refuse_packed(kwargs.get("attention_mask"), kwargs.get("position_ids"))
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if isinstance(cache, StaticCache):
            raise ValueError(
                f"a static cache has no place for the {length} virtual tokens of this prompt: use"
                " the dynamic cache (cache_implementation=None)"
            )
        first = cache is None or cache.get_seq_length() == 0
        kwargs["attention_mask"] = widened(kwargs.get("attention_mask"), length)
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                kwargs[name] = self._moved(kwargs[name], first)
        self.whole = None
        if first:
            embeds = kwargs.get("inputs_embeds")
            embeds = model.embed_tokens(kwargs["input_ids"]) if embeds is None else embeds
            kwargs |= dict(input_ids=None, inputs_embeds=self.prompt(embeds))
            self.whole = length + embeds.shape[1]
        return (), kwargs

    def _moved(self, positions: Tensor, first: bool) -> Tensor:
        moved = positions + self.prompt.length
        if not first:
            return moved
        front = torch.arange(self.prompt.length, device=positions.device)
        return torch.cat([front.expand(*positions.shape[:-1], -1), moved], -1)

    def after(self, model, args, outputs):
        """After the decoder: the tokens' own outputs."""
        whole, length = self.whole, self.prompt.length
        if whole is None:
            return outputs
        if isinstance(outputs, tuple):
            return outputs[0][:, length:], *outputs[1:]
        outputs["last_hidden_state"] = outputs.last_hidden_state[:, length:]
        return _stripped(outputs, length, whole)
