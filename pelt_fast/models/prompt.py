"""How a prompt gets in front of a stack, and what it moves: masks, positions, outputs, the cache.

Nothing a caller hands in or gets back changes its length, but for what an encoder hands its
decoder: token outputs, logits and labels stay aligned with the input ids, and the first token is
the one that is pooled. The virtual tokens are visible to every token, padded left or right. They
take no learned positions (as in the paper's code); under rotary ones, which are relative, they take
the first P and the tokens follow. With a cache they are put in front once, when it is empty.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers import StaticCache

from pelt_fast.modules import Prompt
from pelt_fast.modules.slot import Slot

from .slots import StackSlot, find
from .takeover import Takeover


def attach_prompt(base: nn.Module, stack: StackSlot, prompt: Prompt, takeover: Takeover) -> None:
    """Register the hooks that put ``prompt`` in front of ``stack``."""
    slot, owner = stack.prompt, find(base, stack.owner)
    positions = None if slot.positions is None else find(base, slot.positions)
    if slot.norm is not None:
        front = NormFront(prompt, slot.own_mask)
        takeover.hook(base.register_forward_pre_hook(front.extend_mask, with_kwargs=True))
        takeover.hook(find(base, slot.norm).register_forward_pre_hook(front.prepend))
    elif slot.layer is not None:
        front = LayerFront(prompt)
        takeover.hook(find(base, slot.layer).register_forward_pre_hook(front.prepend))
    elif stack.kind == "encoder":
        front = EncoderFront(prompt, base.get_input_embeddings(), positions)
        takeover.hook(owner.register_forward_pre_hook(front.before_encoder, with_kwargs=True))
        if hasattr(base, "decoder"):
            hook = base.decoder.register_forward_pre_hook(front.before_decoder, with_kwargs=True)
            takeover.hook(hook)
    else:
        front = DecoderFront(prompt, base.get_input_embeddings(), positions)
        takeover.hook(owner.register_forward_pre_hook(front.before, with_kwargs=True))
        takeover.hook(owner.register_forward_hook(front.after))
    if positions is not None:
        takeover.call(positions, front.learned_positions)
    if slot.strip is not None:
        takeover.hook(find(base, slot.strip).register_forward_hook(front.strip))
        takeover.hook(base.register_forward_hook(front.strip_hidden))


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


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by their names."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args)), **kwargs}


class Front:
    """A prompt in front of a stack; ``whole`` is the length of the last forward with it."""

    def __init__(self, prompt: Prompt):
        self.prompt, self.whole = prompt, 0

    def strip(self, module, args, outputs):
        """After the layers: the tokens' own outputs, the first of them first."""
        length = self.prompt.length
        if isinstance(outputs, Tensor):
            return outputs[:, length:]
        if isinstance(outputs, tuple):
            return outputs[0][:, length:], *outputs[1:]
        outputs["last_hidden_state"] = outputs.last_hidden_state[:, length:]
        return _stripped(outputs, length, self.whole)

    def strip_hidden(self, module, args, outputs):
        """After the model."""
        return _stripped(outputs, self.prompt.length, self.whole)

    def prepend(self, module, args):
        """Before a module: its input with the prompt in front."""
        x = self.prompt(args[0])
        self.whole = x.shape[1]
        return (x, *args[1:])


class NormFront(Front):
    """In front of the LayerNorm of summed embeddings (BERT)."""

    def __init__(self, prompt: Prompt, own_mask: bool):
        super().__init__(prompt)
        self.own_mask = own_mask

    def extend_mask(self, module, args, kwargs):
        """Before the model: a mask that covers the prompt."""
        kwargs = _by_name(module, args, kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None and self.own_mask:
            given = kwargs.get("input_ids")
            given = kwargs["inputs_embeds"] if given is None else given
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        return (), {**kwargs, "attention_mask": widened(mask, self.prompt.length)}


class LayerFront(Front):
    """In front of the first layer, where what is embedded is patches or audio (ViT, Whisper)."""

    def prepend(self, module, args):
        """Before the layer."""
        if any(isinstance(mask, Tensor) for mask in args[1:]):
            raise ValueError(
                f"a prompt in front of {type(module).__name__} takes no attention_mask"
            )
        return super().prepend(module, args)


class TokenFront(Front):
    """In front of token embeddings; ``positions`` gives learned ones, or is None."""

    def __init__(self, prompt: Prompt, embeddings: nn.Module, positions: nn.Module | None):
        super().__init__(prompt)
        self.embeddings = Slot(embeddings)
        self.positions = None if positions is None else Slot(positions)

    def embedded(self, kwargs: dict) -> Tensor:
        """The prompt and the tokens behind it."""
        if kwargs.get("token_type_ids") is not None:
            raise ValueError("a prompt has no token_type_ids: leave them away")
        embeds = kwargs.get("inputs_embeds")
        x = self.prompt(self.embeddings(kwargs["input_ids"]) if embeds is None else embeds)
        self.whole = x.shape[1]
        return x

    def behind_prompt(self, positions: Tensor) -> Tensor:
        """The tokens' positions (.., T, d) behind zeros."""
        *rows, _, width = positions.shape
        return torch.cat([positions.new_zeros(*rows, self.prompt.length, width), positions], -2)


class EncoderFront(TokenFront):
    """In front of an encoder's token embeddings; a decoder attends to the prompt too (BART, T5)."""

    def before_encoder(self, module, args, kwargs):
        """Before the encoder: embeddings with the prompt in front, a mask that covers it."""
        kwargs = _by_name(module, args, kwargs)
        mask = widened(kwargs.get("attention_mask"), self.prompt.length)
        given = dict(input_ids=None, inputs_embeds=self.embedded(kwargs), attention_mask=mask)
        return (), {**kwargs, **given}

    def learned_positions(self, ids: Tensor, *args, **kwargs) -> Tensor:
        """The positions module: the tokens', and none for the prompt."""
        return self.behind_prompt(self.positions(ids[:, self.prompt.length :], *args, **kwargs))

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


class DecoderFront(TokenFront):
    """In front of a causal decoder's token embeddings (Llama, OPT, GPT-2)."""

    def before(self, model, args, kwargs):
        """Before the decoder: the prompt where the cache is empty, and everywhere its places."""
        kwargs = _by_name(model, args, kwargs)
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
            kwargs |= dict(inputs_embeds=self.embedded(kwargs), input_ids=None)
        return (), kwargs

    def learned_positions(self, *args, **kwargs) -> Tensor:
        """The positions module: the tokens' as they were, and none for the prompt. What it is asked
        for counts the prompt; hidden tokens are asked for below zero (OPT)."""
        length = self.prompt.length
        if "position_ids" in kwargs:
            ids, given = kwargs["position_ids"], kwargs
        else:
            ids, given = args[0], None
        tokens = ids[:, length:] if self.whole else ids
        tokens = torch.where(tokens < 0, tokens, tokens - length)
        if given is None:
            found = self.positions(tokens, *args[1:], **kwargs)
        else:
            found = self.positions(*args, **{**kwargs, "position_ids": tokens})
        return self.behind_prompt(found) if self.whole else found

    def _moved(self, positions: Tensor, first: bool) -> Tensor:
        moved = positions + self.prompt.length
        if not first:
            return moved
        front = torch.arange(self.prompt.length, device=positions.device)
        return torch.cat([front.expand(*positions.shape[:-1], -1), moved], -1)

    def after(self, model, args, outputs):
        """After the decoder: the tokens' own outputs."""
        return outputs if self.whole is None else self.strip(model, args, outputs)
