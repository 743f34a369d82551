"""A cache whose first keys are a prompt's: its mark, the length it reports, and what is refused.

Code that reads a cache's length (``generate``, or a user's) needs the number of the user's tokens,
without the virtual tokens. So ``get_seq_length`` leaves them out, except for the stack
that is running with the prompt in front. The mark is an attribute of the cache: it is copied and
pickled with it, and stays through crops, reordering and resets. Keys that the present prompt did
not make are refused: those of a cache without a mark, of another prompt, or of this one before it
was trained, loaded or exchanged. Where prompts of several methods begin a cache, the method of each
row is remembered too (``held_routes``).
"""

from functools import partial

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache

from pelt_fast.modules.prompt import Prompt
from pelt_fast.modules.routed_prompt import MixedPrompt

from .held_routes import check_routes, forget_routes, hold_routes, mixed_length

_MARK = "_pelt_prompt"
_ANEW = "start with an empty cache"


class HeldPrompt:
    """The mark: the prompt whose ``length`` keys come first in a cache's ``layers``."""

    def __init__(self, layers: list, prompt: Prompt | MixedPrompt):
        # the layers, not the cache: a reference cycle would keep the memory until it is collected
        self.layers, self.length = layers, prompt.length
        self.rows = {m: rows.detach().clone() for m, rows in prompt.embeddings.items()}
        self.running = False  # whether the stack that put the prompt there is running

    def whole(self, layer_idx: int = 0) -> int:
        """The number of keys of a layer, or of the next one that counts them."""
        for layer in self.layers[layer_idx:]:
            if hasattr(layer, "get_seq_length"):
                return layer.get_seq_length()
        return 0

    def tokens(self, layer_idx: int = 0) -> int:
        """The number of tokens: the cache's ``get_seq_length``."""
        whole = self.whole(layer_idx)
        return whole if self.running else max(whole - self.length, 0)

    def offset(self, layer_idx: int = 0) -> int:
        """The cache's ``get_query_offset``, which a model calls while it runs."""
        if not self.running:
            raise ValueError(
                f"this cache begins with the {self.length} virtual tokens of a prompt, which the"
                f" model that runs now does not carry: {_ANEW}"
            )
        return self.whole(layer_idx)

    def check(self, prompts: dict[int | None, Tensor]) -> None:
        """ValueError unless the layers begin with ``prompts`` and hold equally many keys."""
        lengths = {self.whole(i) for i in range(len(self.layers))} - {0}
        if self.running or len(lengths) > 1:
            raise ValueError(
                f"a forward with this cache broke off and left it half written: {_ANEW}"
            )
        if self.whole() < self.length:
            raise ValueError(
                f"this cache was cropped to {self.whole()} keys, into the {self.length} virtual"
                f" tokens of its prompt: {_ANEW}"
            )
        if torch.compiler.is_compiling():
            return  # a graph cannot read values
        if not all(_equal(self.rows[m], rows) for m, rows in prompts.items() if m in self.rows):
            raise ValueError(
                f"this cache begins with another prompt of {self.length} virtual tokens, or with"
                f" this one before it changed: {_ANEW}"
            )


def _equal(held: Tensor, now: Tensor) -> bool:
    return held.shape == now.shape and torch.equal(held.to(now), now)


def given_cache(kwargs: dict) -> Cache | None:
    """The cache of a stack's own keys among a call's arguments."""
    cache = kwargs.get("cache")
    return _self_attention(kwargs.get("past_key_values") if cache is None else cache)


def held_by(cache: Cache, prompt: Prompt | MixedPrompt, like: Tensor) -> HeldPrompt:
    """The mark of the cache that a forward with the rows of ``like`` was given; an empty cache gets
    one. Raises ValueError for keys that ``prompt`` did not make, and for a static cache, which has
    no room for more of them."""
    if isinstance(cache, StaticCache):
        raise ValueError(
            f"a static cache has no place for the {prompt.length} virtual tokens of this prompt:"
            " use the dynamic cache (cache_implementation=None)"
        )
    held = cache.__dict__.get(_MARK)
    if cache.get_seq_length() == 0 and (held is None or held.whole() == 0):
        return mark(cache, prompt, like)
    if held is None:
        raise ValueError(
            f"this cache holds {cache.get_seq_length()} keys and no mark of a prompt: it was filled"
            f" before inject, by another model or by hand. {_ANEW.capitalize()}; to use one twice,"
            " take copy.deepcopy(cache) of what this model filled"
        )
    check_routes(cache, prompt, like)
    held.check(prompt.embeddings)
    return held


def mark(cache: Cache, prompt: Prompt | MixedPrompt, like: Tensor) -> HeldPrompt:
    """Mark a cache that begins with ``prompt`` in front of each row of ``like``."""
    held = HeldPrompt(cache.layers, prompt)
    setattr(cache, _MARK, held)
    cache.get_seq_length = partial(HeldPrompt.tokens, held)  # a graph can return no bound method
    cache.get_query_offset = partial(HeldPrompt.offset, held)
    hold_routes(cache, prompt, like)
    return held


def forget(cache: Cache | None) -> None:
    """Remove the mark of a cache that is empty again, for a forward in which no prompt acts."""
    held = None if cache is None else cache.__dict__.get(_MARK)
    if held is not None and held.whole() == 0:
        for name in (_MARK, "get_seq_length", "get_query_offset"):
            cache.__dict__.pop(name, None)
        forget_routes(cache)


def mark_returned(outputs, prompt: Prompt | MixedPrompt, like: Tensor) -> None:
    """Mark the caches among a model's outputs that the model made itself."""
    for value in outputs.values() if hasattr(outputs, "values") else outputs:
        if isinstance(value, Cache) and _MARK not in _self_attention(value).__dict__:
            mark(_self_attention(value), prompt, like)


def cross_cache(kwargs: dict) -> DynamicCache | None:
    """The cache of a decoder's cross-attention keys."""
    cross = getattr(kwargs.get("cache"), "cross_attention_cache", None)
    return cross if isinstance(cross, DynamicCache) else None


def check_cross_keys(cross: DynamicCache, prompt: Prompt | MixedPrompt, states: Tensor) -> None:
    """ValueError for cross-attention keys of another length than the encoder outputs ``states``:
    they were made without the prompt. Or under other routes, which an empty cache remembers."""
    if cross.get_seq_length() not in (0, states.shape[1]):
        raise ValueError(
            f"this cache holds {cross.get_seq_length()} keys of an encoder that returned"
            f" {states.shape[1]} now, the prompt's among them: {_ANEW}"
        )
    if cross.get_seq_length() == 0:
        hold_routes(cross, prompt, states)
    elif mixed_length(cross) is not None:
        check_routes(cross, prompt, states)


def _self_attention(cache: Cache | None) -> Cache | None:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
