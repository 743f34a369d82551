"""A prompt in front of token embeddings, with learned positions or without."""

import torch
from torch import Tensor, nn

from .prompt_cache import check_cross_keys
from .prompt_front import Call, Front, by_name, widened


class TokenFront(Front):
    """In front of token embeddings; ``positions`` gives learned positions, or is None."""

    def embedded(self, stack: nn.Module, kwargs: dict) -> Tensor:
        """The prompt and, after it, the tokens (B, P + T, d)."""
        if kwargs.get("token_type_ids") is not None:
            raise ValueError("a prompt has no token_type_ids: leave them away")
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = stack.get_input_embeddings()(kwargs["input_ids"])
        return self.in_front(embeds)

    def behind_prompt(self, positions: Tensor) -> Tensor:
        """The tokens' position embeddings (.., T, d), with zeros for the prompt in front."""
        *rows, _, width = positions.shape
        return torch.cat([positions.new_zeros(*rows, self.prompt.length, width), positions], -2)


class EncoderFront(TokenFront):
    """In front of an encoder's token embeddings; a decoder attends to the prompt too (BART, T5)."""

    def before(self, module, args, kwargs):
        """Before the encoder: embeddings with the prompt in front, a mask that covers it."""
        if not self.acts():
            return None
        kwargs = by_name(module, args, kwargs)
        mask = widened(kwargs.get("attention_mask"), self.prompt.length)
        self.call.put(Call())
        given = dict(input_ids=None, inputs_embeds=self.embedded(module, kwargs))
        return (), {**kwargs, **given, "attention_mask": mask}

    def learned_positions(self, ids: Tensor, *args, **kwargs) -> Tensor:
        """Runs as the positions module: the tokens' positions, and zeros for the prompt."""
        call = self.call.get()
        if call is None:
            return self.positions(ids, *args, **kwargs)
        call.positioned = True
        return self.behind_prompt(self.positions(ids[:, self.prompt.length :], *args, **kwargs))

    def before_decoder(self, module, args, kwargs):
        """Before the decoder: a cross-attention mask as long as the encoder's output."""
        if not self.acts():
            return None
        mask, states = (
            kwargs.get(name) for name in ("encoder_attention_mask", "encoder_hidden_states")
        )
        check_cross_keys(kwargs, states)
        if mask is not None and states is not None:
            missing = states.shape[1] - mask.shape[1]
            if missing == self.prompt.length:
                kwargs = {**kwargs, "encoder_attention_mask": widened(mask, missing)}
        return args, kwargs


class DecoderFront(TokenFront):
    """In front of a causal decoder's token embeddings (Llama, OPT, GPT-2)."""

    def before(self, module, args, kwargs):
        """Before the decoder: the prompt when the cache is empty; mask and positions always count
        it."""
        if not self.acts():
            return None
        kwargs = by_name(module, args, kwargs)
        mask = _mask_of_single_sequences(kwargs)
        mask = widened(mask, self.prompt.length)
        call = self.began(kwargs)
        kwargs["attention_mask"] = mask
        for name in ("position_ids", "cache_position"):
            if kwargs.get(name) is not None:
                kwargs[name] = self._moved(kwargs[name], call.first)
        if call.first:
            kwargs |= dict(inputs_embeds=self.embedded(module, kwargs), input_ids=None)
        return (), kwargs

    def learned_positions(self, *args, **kwargs) -> Tensor:
        """Runs as the positions module: the tokens' positions as they were, and zeros for the
        prompt. The positions it is given count the prompt; those of hidden tokens are negative
        (OPT)."""
        call, length = self.call.get(), self.prompt.length
        if call is None:
            return self.positions(*args, **kwargs)
        call.positioned = True
        named = "position_ids" in kwargs
        ids = kwargs["position_ids"] if named else args[0]
        tokens = ids[:, length:] if call.first else ids
        tokens = torch.where(tokens < 0, tokens, tokens - length)
        if named:
            embedded = self.positions(*args, **{**kwargs, "position_ids": tokens})
        else:
            embedded = self.positions(tokens, *args[1:], **kwargs)
        return self.behind_prompt(embedded) if call.first else embedded

    def _moved(self, positions: Tensor, first: bool) -> Tensor:
        moved = positions + self.prompt.length
        if not first:
            return moved
        front = torch.arange(self.prompt.length, device=positions.device)
        return torch.cat([front.expand(*positions.shape[:-1], -1), moved], -1)


def _mask_of_single_sequences(kwargs: dict) -> Tensor | None:
    """The attention_mask, where each row holds one sequence. Raises ValueError for packed rows: a
    prompt in front of a row would be the first sequence's alone."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None or positions is None or torch.compiler.is_compiling():
        return mask
    if (positions.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids start again within a row: prompt tuning cannot take packed sequences (a"
            " prompt goes in front of a row). Pad them, or use a prefix, which each of them sees"
        )
    no_cache = kwargs.get("cache") is None and kwargs.get("past_key_values") is None
    if not no_cache or not (positions[..., 0] != 0).any():
        return None
    # there is a gap between the prompt's positions and these, which transformers would read as
    # the start of a new sequence
    given = kwargs.get("input_ids")
    given = kwargs["inputs_embeds"] if given is None else given
    return torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
