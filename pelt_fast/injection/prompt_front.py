"""One forward of a stack with a prompt in front: its inputs get the prompt, its outputs lose it."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pelt_fast.modules import Prompt
from pelt_fast.modules.frozen_module import FrozenModule
from pelt_fast.modules.per_thread import PerThread

from .prompt_cache import HeldPrompt, given_cache, held_by, mark_returned


@dataclass
class Call:
    """One forward of a stack under a prompt."""

    held: HeldPrompt | None = None  # the mark of the cache it was given
    first: bool = True  # whether the prompt is put in front; False: the cache has it already
    rows: int = 0
    whole: int = 0  # length of the prompt and the tokens, once it is known
    positioned: bool = False  # whether the learned positions were read


def widened(mask: Tensor | None, length: int) -> Tensor | None:
    """A padding mask (B, T) with ``length`` visible columns in front; None stays None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"prompt tuning takes an attention_mask of shape (batch, tokens), got {given}"
        )
    return torch.cat([mask.new_ones(mask.shape[0], length), mask], 1)


def aligned(value, call: Call, length: int):
    """An output without the virtual tokens, where its shape has them. Of a dict or tuple, each."""
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


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by their names."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args)), **kwargs}


class Front:
    """A prompt in front of a stack. ``strips``: the stack's output loses the virtual tokens.
    ``call`` is the forward that this thread is in."""

    def __init__(self, prompt: Prompt, strips: bool, positions: nn.Module | None = None):
        self.prompt, self.strips, self.call = prompt, strips, PerThread()
        self.positions = None if positions is None else FrozenModule(positions)

    def acts(self) -> bool:
        """Whether the prompt acts in this thread now."""
        return not self.prompt.switch.is_off()

    def before(self, module, args, kwargs):
        """Before the stack."""
        if self.acts():
            self.call.put(Call())

    def began(self, kwargs: dict) -> Call:
        """A forward begins. The prompt is put in front when the cache it was given is empty."""
        cache, call = given_cache(kwargs, self.prompt.length), Call()
        if cache is not None:
            call.held = held_by(cache, self.prompt)
            call.first, call.held.running = call.held.whole() == 0, True
        self.call.put(call)
        return call

    def after(self, module, args, outputs):
        """After the stack: the tokens' own outputs. A cache that the model made is marked."""
        call = self.call.take()
        if call is not None and call.held is not None:
            call.held.running = False
        if call is None or outputs is None:  # None: an exception was raised
            return outputs
        if call.first:
            self._check_reached(module, call)
            mark_returned(outputs, self.prompt)
        return aligned(outputs, call, self.prompt.length) if self.strips else outputs

    def _check_reached(self, module: nn.Module, call: Call) -> None:
        if not call.whole or (self.positions is not None and not call.positioned):
            what = "learned positions" if call.whole else "module that the prompt goes in front of"
            raise RuntimeError(
                f"the {what} of this {type(module).__name__} was replaced after inject, and the"
                " prompt left out: eject, replace it, inject again"
            )

    def strip(self, module, args, outputs):
        """After the layers: the tokens' own outputs, with the first token first."""
        call = self.call.get()
        return outputs if call is None else aligned(outputs, call, self.prompt.length)

    def in_front(self, x: Tensor) -> Tensor:
        """[prompt; x] (B, P + T, d). Sets the length of this forward."""
        x, call = self.prompt(x), self.call.get()
        if call is not None:  # None in the second run of a checkpoint
            call.rows, call.whole = x.shape[:2]
        return x


class NormFront(Front):
    """In front of the LayerNorm of the summed embeddings (BERT, which may be a decoder)."""

    def __init__(self, prompt: Prompt, strips: bool, own_mask: bool):
        super().__init__(prompt, strips)
        self.own_mask = own_mask

    def before(self, module, args, kwargs):
        """Before the model: a mask that covers the prompt."""
        if not self.acts():
            return None
        kwargs = by_name(module, args, kwargs)
        mask = kwargs.get("attention_mask")
        if mask is None and self.own_mask:
            given = kwargs.get("input_ids")
            given = kwargs["inputs_embeds"] if given is None else given
            mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        mask = widened(mask, self.prompt.length)
        self.began(kwargs)
        return (), {**kwargs, "attention_mask": mask}

    def before_embeddings(self, module, args, kwargs):
        """Before the embeddings: their positions continue after the tokens in the cache."""
        call = self.call.get()
        if call is None or call.first or not kwargs.get("cache_length"):
            return None
        return args, {**kwargs, "cache_length": kwargs["cache_length"] - self.prompt.length}

    def prepend(self, module, args):
        """Before the LayerNorm."""
        call = self.call.get()
        return (self.in_front(args[0]), *args[1:]) if call is not None and call.first else args


class LayerFront(Front):
    """In front of the first layer, for embedded patches or audio (ViT, Whisper)."""

    def prepend(self, module, args):
        """Before the layer."""
        if not self.acts():
            return None
        if any(isinstance(mask, Tensor) for mask in args[1:]):
            raise ValueError(
                f"a prompt in front of {type(module).__name__} takes no attention_mask"
            )
        return self.in_front(args[0]), *args[1:]
