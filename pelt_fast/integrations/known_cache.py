"""Caches under accelerate_peft: the prefix is in none of them, and in every one of PEFT's own.

A cache that PEFT filled before would bring the prefix a second time. So one that the accelerated
model fills is marked (the mark copies and pickles with it), and one with keys and no mark refused.
"""

import torch
from transformers import Cache

_MARK = "_pelt_no_prefix"


def refuse_unknown(kwargs: dict) -> None:
    """Mark the caches among a forward's arguments; ValueError for one that something else
    filled."""
    for cache in _caches(kwargs):
        if _MARK not in cache.__dict__ and cache.get_seq_length() > 0:
            raise ValueError(
                f"this cache holds {int(cache.get_seq_length())} keys that the accelerated PEFT"
                " model did not make (PEFT's own caches hold the prefix, ours do not): start with"
                " an empty cache"
            )
        setattr(cache, _MARK, True)


def mark_known(outputs):
    """The outputs, a cache among them marked, which the model may have made itself."""
    for cache in _caches(outputs):
        setattr(cache, _MARK, True)
    return outputs


def _caches(found) -> list[Cache]:
    """The caches among arguments or outputs; none in a graph, which asks nothing of them."""
    if torch.compiler.is_compiling():
        return []
    values = found.values() if hasattr(found, "values") else found
    return [value for value in values if isinstance(value, Cache)]
