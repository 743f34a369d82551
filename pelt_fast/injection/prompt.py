"""How a prompt gets in front of a stack, and what it moves: masks, positions, outputs, the cache.

Nothing a caller hands in or gets back changes its length, but for what an encoder hands its
decoder and the keys in ``attentions``, of which the first P are the prompt's: token outputs, hidden
states, logits and labels stay aligned with the input ids, and the first token is the one that is
pooled. The virtual tokens are visible to every token, padded left or right; in a layer with a
sliding window as far as the window reaches back, as tokens in their places are. They take no
learned positions (as in the paper's code); under rotary ones, which are relative, they take the
first P and the tokens follow. Token embeddings are the stack's own input embeddings, called with
the hooks they have. With a cache the prompt is put in front once, when it is empty; a cache that
holds it counts its tokens alone (``prompt_cache``).
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pelt_fast.layouts.layout import StackLayout
from pelt_fast.layouts.lookup import find
from pelt_fast.modules import Prompt
from pelt_fast.modules.frozen_module import FrozenModule
from pelt_fast.modules.per_thread import PerThread

from .prompt_cache import HeldPrompt, check_cross_keys, given_cache, held_by, mark_returned
from .record import Injection


def attach_prompt(
    base: nn.Module, stack: StackLayout, prompt: Prompt, injection: Injection
) -> None:
    """Register the hooks that put ``prompt`` in front of ``stack``."""
    layout, owner = stack.prompt, find(base, stack.owner)
    positions = None if layout.positions is None else find(base, layout.positions)
    strips = layout.strip is not None or stack.kind == "decoder"
    if layout.norm is not None:
        owner, norm = base, find(base, layout.norm)
        embeddings = find(base, layout.norm.rpartition(".")[0])
        front = NormFront(prompt, strips, layout.own_mask)
        injection.changes.hook(norm.register_forward_pre_hook(front.prepend))
        hook = embeddings.register_forward_pre_hook(front.before_embeddings, with_kwargs=True)
        injection.changes.hook(hook)
    elif layout.layer is not None:
        front = LayerFront(prompt, strips)
        injection.changes.hook(find(base, layout.layer).register_forward_pre_hook(front.prepend))
    elif stack.kind == "encoder":
        front = EncoderFront(prompt, strips, positions)
        if hasattr(base, "decoder"):
            hook = base.decoder.register_forward_pre_hook(front.before_decoder, with_kwargs=True)
            injection.changes.hook(hook)
    else:
        front = DecoderFront(prompt, strips, positions)
    injection.changes.hook(owner.register_forward_pre_hook(front.before, with_kwargs=True))
    injection.changes.hook(owner.register_forward_hook(front.after, always_call=True))
    if positions is not None:
        injection.changes.call(positions, front.learned_positions)
    if layout.strip is not None:
        injection.changes.hook(find(base, layout.strip).register_forward_hook(front.strip))


def widened(mask: Tensor | None, length: int) -> Tensor | None:
    """A padding mask (B, T) with ``length`` visible places in front; None stays None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"prompt tuning takes an attention_mask of shape (batch, tokens), got {found}"
        )
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)


def aligned(value, call: "Call", length: int):
    """An output, or each of several, without the virtual tokens where it has a place for them."""
    if isinstance(value, dict):
        for name in list(value):
            value[name] = aligned(value[name], call, length)
        return value
    if isinstance(value, tuple):
        return tuple(aligned(each, call, length) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 3 and value.shape[1] == call.whole:  # hidden states
        return value[:, length:]
    if value.dim() == 4 and value.shape[2] == call.whole:  # attentions (B, H, T, S): the queries
        return value[:, :, length:]
    if value.dim() == 2 and value.shape[0] == call.rows * call.whole:  # a router's logits
        return value.unflatten(0, (call.rows, call.whole))[:, length:].flatten(0, 1)
    return value


def _by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by their names."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args)), **kwargs}


@dataclass
class Call:
    """One forward of a stack under a prompt."""

    held: HeldPrompt | None = None  # the mark of the cache it was given
    first: bool = True  # whether the prompt is put in front, and does not lie in the cache
    rows: int = 0
    whole: int = 0  # the prompt's length and the tokens', once it is there
    positioned: bool = False  # whether the positions that were taken over were asked


class Front:
    """A prompt in front of a stack, whose output loses the virtual tokens where it ``strips``.
    ``call`` is the forward that the stack is in."""

    def __init__(self, prompt: Prompt, strips: bool, positions: nn.Module | None = None):
        self.prompt, self.strips, self.call = prompt, strips, PerThread()
        self.positions = None if positions is None else FrozenModule(positions)

    def before(self, module, args, kwargs):
        """Before the stack."""
        self.call.put(Call())

    def began(self, kwargs: dict) -> Call:
        """A forward with the cache it was given: the prompt is put in front where that is empty."""
        cache, call = given_cache(kwargs, self.prompt.length), Call()
        if cache is not None:
            call.held = held_by(cache, self.prompt)
            call.first, call.held.running = call.held.whole() == 0, True
        self.call.put(call)
        return call

    def after(self, module, args, outputs):
        """After the stack: the tokens' own outputs, and a cache known to hold the prompt."""
        call = self.call.take()
        if call is not None and call.held is not None:
            call.held.running = False
        if call is None or outputs is None:  # None: an exception is on its way
            return outputs
        if call.first:
            self._check_reached(module, call)
            mark_returned(outputs, self.prompt)
        return aligned(outputs, call, self.prompt.length) if self.strips else outputs

    def _check_reached(self, module: nn.Module, call: Call) -> None:
        if not call.whole or (self.positions is not None and not call.positioned):
            what = "learned positions" if call.whole else "module that the prompt stands before"
            raise RuntimeError(
                f"the {what} of this {type(module).__name__} was replaced after inject, and the"
                " prompt left out: eject, replace it, inject again"
            )

    def strip(self, module, args, outputs):
        """After the layers: the tokens' own outputs, the first of them first."""
        call = self.call.get()
        return outputs if call is None else aligned(outputs, call, self.prompt.length)

    def in_front(self, x: Tensor) -> Tensor:
        """[prompt; x], whose length this forward knows from here."""
        x, call = self.prompt(x), self.call.get()
        if call is not None:  # None in a checkpoint's second run
            call.rows, call.whole = x.shape[:2]
        return x


class NormFront(Front):
    """In front of the LayerNorm of summed embeddings (BERT, which may be a decoder)."""

    def __init__(self, prompt: Prompt, strips: bool, own_mask: bool):
        super().__init__(prompt, strips)
        self.own_mask = own_mask

    def before(self, module, args, kwargs):
        """Before the model: a mask that covers the prompt."""
        kwargs = _by_name(module, args, kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None and self.own_mask:
            given = kwargs.get("input_ids")
            given = kwargs["inputs_embeds"] if given is None else given
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        mask = widened(mask, self.prompt.length)
        self.began(kwargs)
        return (), {**kwargs, "attention_mask": mask}

    def before_embeddings(self, module, args, kwargs):
        """Before the embeddings, whose positions go on behind the tokens in the cache."""
        call = self.call.get()
        if call is None or call.first or not kwargs.get("cache_length"):
            return None
        return args, {**kwargs, "cache_length": kwargs["cache_length"] - self.prompt.length}

    def prepend(self, module, args):
        """Before the LayerNorm."""
        call = self.call.get()
        return (self.in_front(args[0]), *args[1:]) if call is not None and call.first else args


class LayerFront(Front):
    """In front of the first layer, where what is embedded is patches or audio (ViT, Whisper)."""

    def prepend(self, module, args):
        """Before the layer."""
        if any(isinstance(mask, Tensor) for mask in args[1:]):
            raise ValueError(
                f"a prompt in front of {type(module).__name__} takes no attention_mask"
            )
        return self.in_front(args[0]), *args[1:]


class TokenFront(Front):
    """In front of token embeddings; ``positions`` gives learned ones, or is None."""

    def embedded(self, stack: nn.Module, kwargs: dict) -> Tensor:
        """The prompt and the tokens behind it."""
        if kwargs.get("token_type_ids") is not None:
            raise ValueError("a prompt has no token_type_ids: leave them away")
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = stack.get_input_embeddings()(kwargs["input_ids"])
        return self.in_front(embeds)

    def behind_prompt(self, positions: Tensor) -> Tensor:
        """The tokens' positions (.., T, d) behind zeros."""
        *rows, _, width = positions.shape
        return torch.cat([positions.new_zeros(*rows, self.prompt.length, width), positions], -2)


class EncoderFront(TokenFront):
    """In front of an encoder's token embeddings; a decoder attends to the prompt too (BART, T5)."""

    def before(self, module, args, kwargs):
        """Before the encoder: embeddings with the prompt in front, a mask that covers it."""
        kwargs = _by_name(module, args, kwargs)
        mask = widened(kwargs.get("attention_mask"), self.prompt.length)
        self.call.put(Call())
        given = dict(input_ids=None, inputs_embeds=self.embedded(module, kwargs))
        return (), {**kwargs, **given, "attention_mask": mask}

    def learned_positions(self, ids: Tensor, *args, **kwargs) -> Tensor:
        """The positions module: the tokens', and none for the prompt."""
        call = self.call.get()
        if call is None:
            return self.positions(ids, *args, **kwargs)
        call.positioned = True
        return self.behind_prompt(self.positions(ids[:, self.prompt.length :], *args, **kwargs))

    def before_decoder(self, module, args, kwargs):
        """Before the decoder: a cross-attention mask that covers what the encoder returned."""
        mask, states = (
            kwargs.get(name) for name in ("encoder_attention_mask", "encoder_hidden_states")
        )
        check_cross_keys(kwargs, states)
        if mask is not None and states is not None:
            missing = states.shape[1] - mask.shape[1]
            if missing == self.prompt.length:
                kwargs = {**kwargs, "encoder_attention_mask": widened(mask, missing)}
        return args, kwargs


def _one_sequence(kwargs: dict) -> Tensor | None:
    """The attention_mask of rows that hold one sequence each; ValueError for several in a row: one
    prompt in front of it would be the first one's alone."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None or positions is None or torch.compiler.is_compiling():
        return mask
    if (positions.diff(dim=-1) != 1).any():
        raise ValueError(
            "position_ids start again within a row: prompt tuning cannot take packed sequences (a"
            " prompt stands in front of a row). Pad them, or use a prefix, which each of them sees"
        )
    no_cache = kwargs.get("cache") is None and kwargs.get("past_key_values") is None
    if not no_cache or not (positions[..., 0] != 0).any():
        return None
    # behind the prompt they leave a gap, where transformers would see a new sequence begin
    given = kwargs.get("input_ids")
    given = kwargs["inputs_embeds"] if given is None else given
    return torch.ones(given.shape[:2], dtype=torch.long, device=given.device)


class DecoderFront(TokenFront):
    """In front of a causal decoder's token embeddings (Llama, OPT, GPT-2)."""

    def before(self, module, args, kwargs):
        """Before the decoder: the prompt where the cache is empty, and everywhere its places."""
        kwargs = _by_name(module, args, kwargs)
        mask = _one_sequence(kwargs)
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
        """The positions module: the tokens' as they were, and none for the prompt. What it is asked
        for counts the prompt; hidden tokens are asked for below zero (OPT)."""
        call, length = self.call.get(), self.prompt.length
        if call is None:
            return self.positions(*args, **kwargs)
        call.positioned = True
        if "position_ids" in kwargs:
            ids, given = kwargs["position_ids"], kwargs
        else:
            ids, given = args[0], None
        tokens = ids[:, length:] if call.first else ids
        tokens = torch.where(tokens < 0, tokens, tokens - length)
        if given is None:
            found = self.positions(tokens, *args[1:], **kwargs)
        else:
            found = self.positions(*args, **{**kwargs, "position_ids": tokens})
        return self.behind_prompt(found) if call.first else found

    def _moved(self, positions: Tensor, first: bool) -> Tensor:
        moved = positions + self.prompt.length
        if not first:
            return moved
        front = torch.arange(self.prompt.length, device=positions.device)
        return torch.cat([front.expand(*positions.shape[:-1], -1), moved], -1)
