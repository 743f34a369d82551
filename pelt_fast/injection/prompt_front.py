"""One forward of a stack with a prompt in front: its inputs get the prompt, its outputs lose it."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pelt_fast.modules import Prompt
from pelt_fast.modules.frozen_module import FrozenModule
from pelt_fast.modules.per_thread import PerThread
from pelt_fast.modules.routed_prompt import MixedPrompt, RoutedPrompt

from .held_routes import mixed_length
from .prompt_cache import HeldPrompt, forget, given_cache, held_by, mark_returned


def tokens_of(kwargs: dict) -> Tensor:
    """The ids (B, T), or the embeddings (B, T, d), of a call."""
    ids = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if ids is None else ids


def all_seen(like: Tensor, length: int) -> Tensor:
    """A padding mask that hides none of ``length`` tokens in the rows of ``like``."""
    return torch.ones(like.shape[0], length, dtype=torch.long, device=like.device)


@dataclass
class Call:
    """One forward of a stack under a prompt."""

    prompt: Prompt | MixedPrompt  # what acts
    held: HeldPrompt | None = None  # the mark of the cache it was given
    first: bool = True  # whether the prompt is put in front; False: the cache has it already
    past: int = 0  # the number of tokens in the cache
    whole: int = 0  # length of the prompt and the tokens, once it is known
    tokens: Tensor | None = None  # their ids or embeddings, a row for each of the batch
    placed: bool = False  # whether the caller gave the positions
    positioned: bool = False  # whether the learned positions were read

    @property
    def length(self) -> int:
        """P."""
        return self.prompt.length

    def seen(self) -> Tensor:
        """How many virtual tokens each row sees, (B, 1)."""
        return self.prompt.visible(all_seen(self.tokens, 0)).sum(1, keepdim=True)


def widened(mask: Tensor | None, prompt: Prompt | MixedPrompt) -> Tensor | None:
    """A padding mask (B, T) with the columns of the prompt in front; None stays None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"prompt tuning takes an attention_mask of shape (batch, tokens), got {given}"
        )
    return torch.cat([prompt.visible(mask), mask], 1)


def aligned(value, call: Call):
    """An output without the virtual tokens, where its shape has them. Of a dict or tuple, each."""
    if isinstance(value, dict):
        for name in list(value):
            value[name] = aligned(value[name], call)
        return value
    if isinstance(value, tuple):
        return tuple(aligned(each, call) for each in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 3 and value.shape[1] == call.whole:  # hidden states
        return value[:, call.length :]
    if value.dim() == 4 and value.shape[2] == call.whole:  # attentions (B, H, T, S): the queries
        return value[:, :, call.length :]
    rows = 0 if call.tokens is None else call.tokens.shape[0]
    if value.dim() == 2 and value.shape[0] == rows * call.whole:  # a router's logits
        return value.unflatten(0, (rows, call.whole))[:, call.length :].flatten(0, 1)
    return value


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by their names."""
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args)), **kwargs}


class Front:
    """A prompt in front of a stack. ``strips``: the stack's output loses the virtual tokens.
    ``call`` is the forward that this thread is in."""

    def __init__(
        self, prompt: Prompt | RoutedPrompt, strips: bool, positions: nn.Module | None = None
    ):
        self.prompt, self.strips, self.call = prompt, strips, PerThread()
        self.positions = None if positions is None else FrozenModule(positions)

    def before(self, module, args, kwargs):
        """Before the stack."""
        prompt = self.prompt.now()
        if prompt is not None:
            self.call.put(Call(prompt))

    def begun(self, kwargs: dict) -> Call | None:
        """The forward that begins; None: no prompt acts in it. The prompt is put in front when the
        cache it was given is empty."""
        cache = given_cache(kwargs)
        prompt = self.prompt.now(mixed_length(cache))
        if prompt is None:
            forget(cache)
            return None
        call = Call(prompt, tokens=tokens_of(kwargs))
        if cache is not None:
            call.held = held_by(cache, prompt, call.tokens)
            whole = call.held.whole()
            call.first, call.past = whole == 0, max(whole - call.length, 0)
        return call

    def run(self, call: Call) -> None:
        """The stack runs from here on."""
        if call.held is not None:
            call.held.running = True
        self.call.put(call)

    def mask_of(self, call: Call, mask: Tensor | None) -> Tensor | None:
        """The padding mask of prompt and tokens. Where a row has virtual tokens that it must not
        see, there is always one."""
        if mask is None and call.prompt.hides:
            mask = all_seen(call.tokens, call.past + call.tokens.shape[1])
        return widened(mask, call.prompt)

    def after(self, module, args, outputs):
        """After the stack: the tokens' own outputs. A cache that the model made is marked."""
        call = self.call.take()
        if call is not None and call.held is not None:
            call.held.running = False
        if call is None or outputs is None:  # None: an exception was raised
            return outputs
        if call.first:
            self._check_reached(module, call)
            mark_returned(outputs, call.prompt, call.tokens)
        return aligned(outputs, call) if self.strips else outputs

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
        return outputs if call is None else aligned(outputs, call)

    def in_front(self, x: Tensor) -> Tensor:
        """[prompt; x] (B, P + T, d). Sets the length of this forward."""
        call = self.call.get()
        if call is None:  # the second run of a checkpoint
            prompt = self.prompt.now()
            return x if prompt is None else prompt(x)
        wide = call.prompt(x)
        call.tokens, call.whole = x, wide.shape[1]
        return wide


class NormFront(Front):
    """In front of the LayerNorm of the summed embeddings (BERT, which may be a decoder)."""

    def __init__(self, prompt: Prompt | RoutedPrompt, strips: bool, own_mask: bool):
        super().__init__(prompt, strips)
        self.own_mask = own_mask

    def before(self, module, args, kwargs):
        """Before the model: a mask that covers the prompt."""
        kwargs = by_name(module, args, kwargs)
        call = self.begun(kwargs)
        if call is None:
            return None
        mask = kwargs.get("attention_mask")
        if mask is None and self.own_mask:
            mask = all_seen(call.tokens, call.tokens.shape[1])
        mask = self.mask_of(call, mask)
        self.run(call)
        return (), {**kwargs, "attention_mask": mask}

    def before_embeddings(self, module, args, kwargs):
        """Before the embeddings: their positions continue after the tokens in the cache."""
        call = self.call.get()
        if call is None or call.first or not kwargs.get("cache_length"):
            return None
        return args, {**kwargs, "cache_length": kwargs["cache_length"] - call.length}

    def prepend(self, module, args):
        """Before the LayerNorm."""
        call = self.call.get()
        return (self.in_front(args[0]), *args[1:]) if call is not None and call.first else args


class LayerFront(Front):
    """In front of the first layer, for embedded patches or audio (ViT, Whisper)."""

    def before(self, module, args, kwargs):
        """Before the stack. There is no mask: every row must see all virtual tokens."""
        prompt = self.prompt.now()
        if isinstance(prompt, MixedPrompt) and prompt.hides:
            raise ValueError(
                f"{type(module).__name__} has no mask that could hide a virtual token, so that the"
                " rows of a batch must have prompts of one length there; these may have"
                f" {', '.join(map(str, prompt.lengths))} virtual tokens: give rows of another"
                " length, and those without a prompt, a batch of their own"
            )
        super().before(module, args, kwargs)

    def prepend(self, module, args):
        """Before the layer."""
        if self.prompt.now() is None:
            return None
        if any(isinstance(mask, Tensor) for mask in args[1:]):
            raise ValueError(
                f"a prompt in front of {type(module).__name__} takes no attention_mask"
            )
        return self.in_front(args[0]), *args[1:]
