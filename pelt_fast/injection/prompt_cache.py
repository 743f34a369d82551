"""A cache whose first keys are a prompt's: its mark, the length it reports, and what is refused.

Code that reads a cache's length (``generate``, or a user's) needs the number of the user's tokens,
without the virtual tokens. So ``get_seq_length`` leaves them out, except for the stack
that is running with the prompt in front. The mark is an attribute of the cache: it is copied and
pickled with it, and stays through crops, reordering and resets. Keys that the present prompt did
not make are refused: those of a cache without a mark, of another prompt, or of this one before it
was trained, loaded or exchanged.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache

_MARK = "_pelt_prompt"
_ANEW = "start with an empty cache"


class HeldPrompt:
    """The mark: the prompt (P, d) whose keys come first in a cache's ``layers``."""

    def __init__(self, layers: list, rows: Tensor):
        # the layers, not the cache: a reference cycle would keep the memory until it is collected
        self.layers, self.rows = layers, rows.detach().clone()
        self.running = False  # whether the stack that put the prompt there is running

    @property
    def length(self) -> int:
        """P."""
        return self.rows.shape[0]

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

    def check(self, prompt: Tensor) -> None:
        """ValueError unless the layers begin with ``prompt`` and hold equally many keys."""
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
        if self.rows.shape != prompt.shape or not torch.equal(self.rows.to(prompt), prompt):
            raise ValueError(
                f"this cache begins with another prompt of {self.length} virtual tokens, or with"
                f" this one before it changed: {_ANEW}"
            )


def given_cache(kwargs: dict, length: int) -> Cache | None:
    """The cache of a stack's own keys among a call's arguments. Raises ValueError for a static one,
    which has no room for ``length`` more keys."""
    cache = kwargs.get("cache")
    cache = _self_attention(kwargs.get("past_key_values") if cache is None else cache)
    if isinstance(cache, StaticCache):
        raise ValueError(
            f"a static cache has no place for the {length} virtual tokens of this prompt: use the"
            " dynamic cache (cache_implementation=None)"
        )
    return cache


def held_by(cache: Cache, prompt: nn.Module) -> HeldPrompt:
    """The mark of the cache that a forward was given; an empty cache gets one. Raises ValueError
    for keys that ``prompt`` did not make."""
    held = cache.__dict__.get(_MARK)
    if cache.get_seq_length() == 0 and (held is None or held.whole() == 0):
        return mark(cache, prompt)
    if held is None:
        raise ValueError(
            f"this cache holds {cache.get_seq_length()} keys and no mark of a prompt: it was filled"
            f" before inject, by another model or by hand. {_ANEW.capitalize()}; to use one twice,"
            " take copy.deepcopy(cache) of what this model filled"
        )
    held.check(prompt.embedding)
    return held


def mark(cache: Cache, prompt: nn.Module) -> HeldPrompt:
    """Mark a cache that begins with ``prompt``."""
    held = HeldPrompt(cache.layers, prompt.embedding)
    setattr(cache, _MARK, held)
    cache.get_seq_length = partial(HeldPrompt.tokens, held)  # a graph can return no bound method
    cache.get_query_offset = partial(HeldPrompt.offset, held)
    return held


def mark_returned(outputs, prompt: nn.Module) -> None:
    """Mark the caches among a model's outputs that the model made itself."""
    for value in outputs.values() if hasattr(outputs, "values") else outputs:
        if isinstance(value, Cache) and _MARK not in _self_attention(value).__dict__:
            mark(_self_attention(value), prompt)


def check_cross_keys(kwargs: dict, states: Tensor | None) -> None:
    """ValueError for a decoder's cache whose cross-attention keys have another length than the
    encoder outputs ``states``: they were made without the prompt."""
    cross = getattr(kwargs.get("cache"), "cross_attention_cache", None)
    if states is None or not isinstance(cross, DynamicCache):
        return
    if cross.get_seq_length() not in (0, states.shape[1]):
        raise ValueError(
            f"this cache holds {cross.get_seq_length()} keys of an encoder that returned"
            f" {states.shape[1]} now, the prompt's among them: {_ANEW}"
        )


def _self_attention(cache: Cache | None) -> Cache | None:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
