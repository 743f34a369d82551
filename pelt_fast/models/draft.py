"""A draft of a table row for an architecture that has none, guessed from the names of its modules.

What a name cannot tell is left as "?": the draft is a form to fill in, not an answer.
"""

import re

from torch import nn

from .slots import base_of

UNKNOWN = "?"
# one guess each, the first that a layer has; matched against the last step of a path
NAMES = {
    "q": ("q_proj", "query", "query_proj", "q", "q_lin", "wq", "fc_q"),
    "k": ("k_proj", "key", "key_proj", "k", "k_lin", "wk", "fc_k"),
    "v": ("v_proj", "value", "value_proj", "v", "v_lin", "wv", "fc_v"),
    "out": ("o_proj", "out_proj", "dense", "o", "out_lin", "wo"),
    "in_proj": ("up_proj", "fc1", "wi", "wi_1", "lin1", "dense_h_to_4h", "fc_in"),
    "gate_proj": ("gate_proj", "wi_0"),
    "out_proj": ("down_proj", "fc2", "wo", "lin2", "dense_4h_to_h", "fc_out"),
    "activation": ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation"),
}
# what configs call their activation
CONFIG = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation")
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)


def draft(model: nn.Module) -> str:
    """Python that makes a :class:`~pelt_fast.SlotMap` of what the names of ``model`` suggest."""
    base = base_of(model)
    stacks = "".join(_stack(base, path) for path in _stacks(base))
    kind = model.config.model_type
    return (
        f"# a draft for {type(model).__name__}: check every path, fill in each {UNKNOWN!r}\n"
        "from pelt_fast import AttentionSlot, FFNSlot, SlotMap, StackSlot\n\n"
        f"slots = SlotMap({kind!r}, (\n{stacks}))\n# pelt_fast.inject(model, method, slots=slots)"
    )


def _stacks(base: nn.Module) -> list[str]:
    """Paths of the lists of like layers that hold a projection of queries."""
    return [
        path for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
        and len({type(layer) for layer in module}) == 1 and _paths(module[0], "q")
    ]  # fmt: skip


def _paths(layer: nn.Module, role: str, under: str = "") -> list[str]:
    """Paths of a layer's modules whose last step is one of the names of ``role``."""
    found = {path: path.rpartition(".")[2] for path, _ in layer.named_modules() if path}
    return [
        path for name in NAMES[role] for path, last in found.items()
        if last == name and path.startswith(under)
    ]  # fmt: skip


def _first(layer: nn.Module, role: str, under: str = "") -> str:
    return next(iter(_paths(layer, role, under)), UNKNOWN)


def _stack(base: nn.Module, path: str) -> str:
    layer, owner = base.get_submodule(path)[0], path.rpartition(".")[0]
    first = layer.get_submodule(_paths(layer, "q")[0].rpartition(".")[0])
    kind = "decoder" if getattr(first, "is_causal", "decoder" in path) else "encoder"
    own = "".join(_attention(layer, query, kind) for query in _paths(layer, "q"))
    ffn = _ffn(layer, base.config)
    return (
        f"    StackSlot({kind!r}, owner={owner!r}, layers={path!r}, attentions=(\n{own}    ),\n"
        f"    ffn={ffn}),\n"
    )


def _attention(layer: nn.Module, query: str, kind: str) -> str:
    module = query.rpartition(".")[0]
    kind = "cross" if _CROSS.search(module) else kind
    under = module + "." if module else ""
    keys, values, out = (_first(layer, role, under) for role in ("k", "v", "out"))
    if out == UNKNOWN and "." in module:  # BERT: beside the attention, not in it
        out = _first(layer, "out", module.rpartition(".")[0] + ".")
    names = ", ".join(map(repr, (kind, module, query, keys, values, out)))
    return f"        AttentionSlot({names}),\n"


def _ffn(layer: nn.Module, config) -> str:
    into, out, gate, activation = (
        _first(layer, role) for role in ("in_proj", "out_proj", "gate_proj", "activation")
    )
    parent = into.rpartition(".")[0]
    entry = parent if parent and parent == out.rpartition(".")[0] else into
    name = next((key for key in CONFIG if getattr(config, key, None)), UNKNOWN)
    gated = "" if gate == UNKNOWN else f", gate_proj={gate!r}"
    return (
        f"FFNSlot({entry!r}, {into!r}, {out!r}, {activation!r}, config_activation={name!r}{gated})"
    )
