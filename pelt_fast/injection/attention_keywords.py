"""The keyword arguments that transformers' models give their attention function.

With a prefix each one is understood, harmless, or refused by name. One that is in none of the three
tables is refused, too.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable

from torch import nn

# the keywords that the functions of ``attention_interface`` use
UNDERSTOOD = frozenset((
    "attention_mask", "dropout", "is_causal", "key", "output_attentions", "position_bias", "query",
    "scaling", "value",
))  # fmt: skip
_PACKED = "flash attention's packed sequences; under sdpa and eager the mask tells them apart"
_SPARSE = "a sparse kernel's choice of keys; under sdpa and eager the mask contains it"
_MODEL = "the model's own, handed down with its other keywords; no attention reads it"
# what transformers' own sdpa and eager ignore as well, and why
HARMLESS = {
    "sliding_window": "flash attention's; under sdpa and eager the mask has the window",
    "position_ids": _PACKED, "cu_seq_lens_q": _PACKED, "cu_seq_lens_k": _PACKED,
    "max_length_q": _PACKED, "max_length_k": _PACKED, "seq_idx": _PACKED,
    "indices": _SPARSE, "block_indices": _SPARSE,
    "deterministic": "flash attention's choice of a backward",
    "use_top_left_mask": "how old flash attention aligned its mask",
    "target_dtype": "what flash attention casts a float32 input to",
    "softmax_scale": "flash attention's name of the scale, which comes as scaling too",
    **dict.fromkeys(
        ("cache_position", "labels", "logits_to_keep", "num_items_in_batch", "output_hidden_states",
         "output_router_logits", "return_dict", "use_cache"),
        _MODEL,
    ),
}  # fmt: skip
_SINK = "attention sinks, which take a part of the softmax's mass"
_SOFTCAP = "a cap on the scores: a prefix needs the log-sum-exp of capped scores, which no kernel"
# what changes the scores or the values, which a prefix would not take part in
REFUSED = {
    "s_aux": _SINK, "sinks": _SINK, "learnable_sink": _SINK,
    "softcap": f"{_SOFTCAP} gives",
    "head_mask": "a factor on each head's weights", "layer_head_mask": "a factor on each head's"
    " weights", "alibi": "a bias on the scores that is no part of the mask",
    "score_mod": "a function of the scores", "block_mask": "a mask that only flex attention reads",
}  # fmt: skip


# the keywords that sdpa and eager take with a prefix, at any value
KNOWN = UNDERSTOOD | HARMLESS.keys()


def check_given(module: nn.Module, kwargs: dict) -> None:
    """ValueError for a keyword argument that does not work with a prefix. One that is None counts
    as not given."""
    for name, value in kwargs.items():
        if value is not None and name not in UNDERSTOOD and name not in HARMLESS:
            raise ValueError(_message(module, name))


def check_known(module: nn.Module) -> None:
    """The same check before any forward: for the keywords in the module's code whose values can be
    read from the module, and for attention sinks that it holds."""
    if getattr(module, "sinks", None) is not None:
        raise ValueError(_message(module, "sinks"))
    for name, expression in _named(inspect.unwrap(type(module).forward)):
        if name not in UNDERSTOOD and name not in HARMLESS and _value(module, expression):
            raise ValueError(_message(module, name))


def _message(module: nn.Module, name: str) -> str:
    what = REFUSED.get(name, "a keyword that pelt_fast does not know")
    return (
        f"{type(module).__name__} hands its attention {name!r} ({what}): a prefix would drop it."
        " Put a method without a prefix on it, or turn it off in the config"
    )


@functools.lru_cache(maxsize=256)  # reading the source takes longer than building the method
def _named(forward: Callable) -> list[tuple[str, ast.expr]]:
    """The keywords, with their expressions, in an attention's call of its function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return []  # no source: check_given runs at the first forward
    return calls(tree)


def calls(tree: ast.AST) -> list[tuple[str, ast.expr]]:
    """Name and value of each keyword in the calls of an ``attention_interface``."""
    return [
        (keyword.arg, keyword.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attention_interface"
        for keyword in node.keywords
        if keyword.arg is not None
    ]


def _value(module: nn.Module, expression: ast.expr) -> bool:
    """Whether an expression is not None. It is evaluated when it is an attribute of the module;
    anything that the forward computes counts as not None."""
    steps = []
    while isinstance(expression, ast.Attribute):
        steps.append(expression.attr)
        expression = expression.value
    if isinstance(expression, ast.Constant):
        return expression.value is not None
    value = module if isinstance(expression, ast.Name) and expression.id == "self" else True
    if value is module:
        for step in reversed(steps):
            value = getattr(value, step, None)
    return value is not None
