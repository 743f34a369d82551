"""The method of each row of a cache that prompts of several methods begin.

The rows of such a cache have virtual tokens of their own in front, some of them hidden. A forward
that goes on with it must run each row under the method that filled it. The mark is an attribute of
the cache: it is copied and pickled with it, and follows the rows that the cache keeps, repeats or
reorders.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import Cache

from pelt_fast.modules.prompt import Prompt
from pelt_fast.modules.routed_prompt import MixedPrompt

_MARK = "_pelt_routes"
_MOVES = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")


class HeldRoutes:
    """The mark: ``methods`` (rows), ``length`` virtual tokens in front of each row."""

    def __init__(self, layers: list, methods: Tensor, length: int):
        # the layers, not the cache: a reference cycle would keep the memory until it is collected
        self.layers, self.methods, self.length = layers, methods.clone(), length


def _moved(held: HeldRoutes, name: str, rows: Tensor | int) -> None:
    """The cache's method ``name``, for the layers and for the mark."""
    for layer in held.layers:
        getattr(layer, name)(rows)
    if isinstance(rows, Tensor):
        held.methods = held.methods[rows.to(held.methods.device)]
    elif name == "batch_repeat_interleave":
        held.methods = held.methods.repeat_interleave(rows)
    else:
        held.methods = held.methods[rows]


def hold_routes(cache: Cache, prompt: Prompt | MixedPrompt, like: Tensor) -> None:
    """Mark an empty cache with the methods of the rows of ``like``. Under one method it has no
    mark."""
    forget_routes(cache)
    methods = prompt.methods(like.shape[0], like.device)
    if methods is None:
        return
    held = HeldRoutes(cache.layers, methods, prompt.length)
    setattr(cache, _MARK, held)
    for name in _MOVES:
        setattr(cache, name, partial(_moved, held, name))


def forget_routes(cache: Cache) -> None:
    """Remove the mark."""
    for name in (_MARK, *_MOVES):
        cache.__dict__.pop(name, None)


def mixed_length(cache: Cache | None) -> int | None:
    """The number of virtual tokens in front of a cache that prompts of several methods begin; None
    for any other, and an empty one."""
    held = None if cache is None else cache.__dict__.get(_MARK)
    return None if held is None or not any(map(_filled, held.layers)) else held.length


def check_routes(cache: Cache, prompt: Prompt | MixedPrompt, like: Tensor) -> None:
    """ValueError unless the rows of ``like`` are under the methods that filled the cache."""
    if torch.compiler.is_compiling():
        return  # a graph cannot read values
    held, methods = cache.__dict__.get(_MARK), prompt.methods(like.shape[0], like.device)
    if held is None and methods is None:
        return
    if held is None or methods is None or not _equal(held.methods, methods):
        raise ValueError(
            "this cache was filled under other routes: its rows have virtual tokens of other"
            " methods in front. Route each row as before, or start with an empty cache"
        )


def _equal(held: Tensor, now: Tensor) -> bool:
    return held.shape == now.shape and torch.equal(held.to(now.device), now)


def _filled(layer) -> bool:
    return hasattr(layer, "get_seq_length") and layer.get_seq_length() > 0
