"""Caches under accelerate_peft: PEFT's own caches hold the prefix, our caches do not.

With a cache that PEFT filled before, the prefix would be attended to twice. So a cache that the
accelerated model fills is marked; the mark is copied and pickled with it. A cache that has keys and
no mark is refused.
"""

import torch
from transformers import Cache

_MARK = "_pelt_no_prefix"


def refuse_unknown(kwargs: dict) -> None:
    """Mark the caches among a forward's arguments. Raises ValueError for one that another model
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
    """The outputs. Caches among them, which the model may have made itself, are marked."""
    for cache in _caches(outputs):
        setattr(cache, _MARK, True)
    return outputs


def _caches(named) -> list[Cache]:
    """The caches among arguments or outputs; none while a graph is traced."""
    if torch.compiler.is_compiling():
        return []
    values = named.values() if hasattr(named, "values") else named
    return [value for value in values if isinstance(value, Cache)]
