"""A prompt in front of token embeddings, with learned positions or without."""

import inspect

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pelt_fast.modules import Prompt
from pelt_fast.modules.routed_prompt import MixedPrompt

from .held_routes import mixed_length
from .prompt_cache import check_cross_keys, cross_cache
from .prompt_front import Call, Front, all_seen, by_name, tokens_of, widened


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

    @staticmethod
    def behind_prompt(positions: Tensor, length: int) -> Tensor:
        """The tokens' position embeddings (.., T, d), with zeros for the prompt in front."""
        *rows, _, width = positions.shape
        return torch.cat([positions.new_zeros(*rows, length, width), positions], -2)

    def moved(self, stack: nn.Module, kwargs: dict, call: Call) -> dict:
        """The positions among a call's arguments, moved behind the prompt. Relative ones count the
        virtual tokens that the row sees, as they do where its prompt is alone: a prefix, which has
        no position, tells them apart."""
        found = {
            name: _moved(kwargs[name], call)
            for name in ("position_ids", "cache_position")
            if kwargs.get(name) is not None
        }
        if self.positions is not None or not call.prompt.hides:
            return found
        tokens, relative = tokens_of(kwargs), kwargs.get("position_ids")
        if relative is None and "position_ids" in inspect.signature(stack.forward).parameters:
            relative = torch.arange(tokens.shape[1], device=tokens.device)[None] + call.past
        if relative is not None:
            found["position_ids"] = _moved(relative, call, call.length - call.seen())
        return found


class EncoderFront(TokenFront):
    """In front of an encoder's token embeddings; a decoder attends to the prompt too (BART, T5)."""

    def before(self, module, args, kwargs):
        """Before the encoder: embeddings with the prompt in front, a mask that covers it."""
        prompt = self.prompt.now()
        if prompt is None:
            return None
        kwargs = by_name(module, args, kwargs)
        call = Call(prompt, tokens=tokens_of(kwargs))
        mask = self.mask_of(call, kwargs.get("attention_mask"))
        self.run(call)
        given = dict(input_ids=None, inputs_embeds=self.embedded(module, kwargs))
        if self.positions is None:
            given |= self.moved(module, kwargs, call)
        return (), {**kwargs, **given, "attention_mask": mask}

    def learned_positions(self, ids: Tensor, *args, **kwargs) -> Tensor:
        """Runs as the positions module: the tokens' positions, and zeros for the prompt."""
        call = self.call.get()
        if call is None:
            return self.positions(ids, *args, **kwargs)
        call.positioned = True
        tokens = self.positions(ids[:, call.length :], *args, **kwargs)
        return self.behind_prompt(tokens, call.length)

    def before_decoder(self, module, args, kwargs):
        """Before the decoder: a cross-attention mask as long as the encoder's output."""
        mask, states = (
            kwargs.get(name) for name in ("encoder_attention_mask", "encoder_hidden_states")
        )
        missing = 0 if mask is None or states is None else states.shape[1] - mask.shape[1]
        cross = cross_cache(kwargs)
        prompt = self._in_front_of_states(cross, missing)
        if prompt is None or states is None:
            return None
        if cross is not None:
            check_cross_keys(cross, prompt, states)
        if mask is None and prompt.hides:
            mask, missing = all_seen(states, states.shape[1] - prompt.length), prompt.length
        if mask is not None and missing == prompt.length:
            kwargs = {**kwargs, "encoder_attention_mask": widened(mask, prompt)}
        return args, kwargs

    def _in_front_of_states(
        self, cross: DynamicCache | None, missing: int
    ) -> Prompt | MixedPrompt | None:
        """The prompt in front of the encoder's outputs, of which a mask leaves out ``missing``.
        They may have come from rows of which some are gone, with other lengths among them."""
        held = mixed_length(cross)
        prompt = self.prompt.now(held)
        if held is None and missing > 0 and (prompt is None or prompt.length != missing):
            prompt = self.prompt.now(missing)
        if isinstance(prompt, MixedPrompt) and prompt.lengths[-1] > prompt.length:
            raise ValueError(
                f"the encoder's outputs have {prompt.length} virtual tokens in front, and a row's"
                f" prompt has {prompt.lengths[-1]}: they were made under other routes"
            )
        return prompt


class DecoderFront(TokenFront):
    """In front of a causal decoder's token embeddings (Llama, OPT, GPT-2)."""

    def before(self, module, args, kwargs):
        """Before the decoder: the prompt when the cache is empty; mask and positions always count
        it."""
        kwargs = by_name(module, args, kwargs)
        call = self.begun(kwargs)
        if call is None:
            return None
        mask = self.mask_of(call, _mask_of_single_sequences(kwargs))
        self.run(call)
        call.placed = kwargs.get("position_ids") is not None
        kwargs |= dict(attention_mask=mask, **self.moved(module, kwargs, call))
        if call.first:
            kwargs |= dict(inputs_embeds=self.embedded(module, kwargs), input_ids=None)
        return (), kwargs

    def learned_positions(self, *args, **kwargs) -> Tensor:
        """Runs as the positions module: the tokens' positions as they were, and zeros for the
        prompt. The positions it is given count the prompt; those of hidden tokens are negative
        (OPT)."""
        call = self.call.get()
        if call is None:
            return self.positions(*args, **kwargs)
        call.positioned = True
        named = "position_ids" in kwargs
        ids = kwargs["position_ids"] if named else args[0]
        tokens = ids[:, call.length :] if call.first else ids
        tokens = torch.where(tokens < 0, tokens, tokens - _counted(ids, call))
        if named:
            embedded = self.positions(*args, **{**kwargs, "position_ids": tokens})
        else:
            embedded = self.positions(tokens, *args[1:], **kwargs)
        return self.behind_prompt(embedded, call.length) if call.first else embedded


def _counted(ids: Tensor, call: Call) -> Tensor | int:
    """How many virtual tokens the positions ``ids`` of each row count. A model that counts what a
    mask shows (OPT) counts those that the row sees, any other counts all."""
    if call.placed or not call.prompt.hides:
        return call.length
    if call.first:
        return ids[:, call.length - 1 : call.length] + 1
    return torch.where(ids[:, :1] == call.length + call.past, call.length, call.seen())


def _moved(positions: Tensor, call: Call, hidden: Tensor | int = 0) -> Tensor:
    """Positions behind the prompt; in the first forward the prompt's own are in front. In each row
    ``hidden`` virtual tokens (B, 1) do not count."""
    moved = positions + (call.length - hidden)
    if not call.first:
        return moved
    front = (torch.arange(call.length, device=positions.device) - hidden).clamp(min=0)
    return torch.cat([front.expand(*moved.shape[:-1], -1), moved], -1)


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
    tokens = tokens_of(kwargs)
    return all_seen(tokens, tokens.shape[1])
