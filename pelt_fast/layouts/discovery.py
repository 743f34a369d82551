"""A draft of a layout for an architecture that is not in the table, guessed from module names.

"?" marks a fact that a name cannot tell, with a comment that says why. A person must complete the
draft. Each part of a block is either in the draft or in a comment.
"""

import re

import torch
from torch import nn

from .layout import FFNLayout
from .lookup import base_of, has
from .unnamed import unnamed_in_block

UNKNOWN = "?"
# names to try, in order; compared with the last step of a path
NAMES = {
    "q": ("q_proj", "query", "query_proj", "q", "q_lin", "wq", "fc_q"),
    "k": ("k_proj", "key", "key_proj", "k", "k_lin", "wk", "fc_k"),
    "v": ("v_proj", "value", "value_proj", "v", "v_lin", "wv", "fc_v"),
    "qkv": ("query_key_value", "qkv_proj", "Wqkv", "qkv", "c_attn", "att_proj"),
    "out": ("o_proj", "out_proj", "dense", "o", "out_lin", "wo"),
    "in_proj": ("up_proj", "fc1", "wi", "wi_1", "lin1", "dense_h_to_4h", "fc_in"),
    "gate_proj": ("gate_proj", "wi_0"),
    "out_proj": ("down_proj", "fc2", "wo", "lin2", "dense_4h_to_h", "fc_out"),
    "activation": ("act_fn", "activation_fn", "act", "intermediate_act_fn", "activation"),
}
# the names that configs use for their activation
CONFIG = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation")
_CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|moe|router|mixture", re.IGNORECASE)


def draft(model: nn.Module) -> str:
    """Python that makes the :class:`~pelt_fast.Layout` that the names in ``model`` suggest."""
    base = base_of(model)
    stacks = "".join(_stack(base, path) for path in _stacks(base))
    if not stacks:
        stacks = "    # no list of layers with a projection of queries was found: '?'\n"
    kind = model.config.model_type
    return (
        f"# a draft for {type(model).__name__}: check every path, fill in each {UNKNOWN!r}\n"
        "from pelt_fast import AttentionLayout, FFNLayout, Layout, StackLayout\n\n"
        f"layout = Layout({kind!r}, (\n{stacks}))\n# pelt_fast.inject(model, method, layout=layout)"
    )


def _stacks(base: nn.Module) -> list[str]:
    """Paths of the lists of layers that have a query projection."""
    return [
        path for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and _queries(module[0])
    ]  # fmt: skip


def _queries(layer: nn.Module) -> list[str]:
    """Paths of the query projections, alone or joined with keys and values."""
    return _paths(layer, "q") or _paths(layer, "qkv")


def _paths(layer: nn.Module, role: str, under: str = "") -> list[str]:
    """Paths of a layer's modules whose last step is one of the names of ``role``."""
    last_steps = {path: path.rpartition(".")[2] for path, _ in layer.named_modules() if path}
    return [
        path for name in NAMES[role] for path, last in last_steps.items()
        if last == name and path.startswith(under)
    ]  # fmt: skip


def _first(layer: nn.Module, role: str, under: str = "") -> str:
    return next(iter(_paths(layer, role, under)), UNKNOWN)


def _stack(base: nn.Module, path: str) -> str:
    layers, owner = base.get_submodule(path), path.rpartition(".")[0]
    layer = layers[0]
    first = layer.get_submodule(_queries(layer)[0].rpartition(".")[0])
    kind = "decoder" if getattr(first, "is_causal", "decoder" in path) else "encoder"
    attentions = "".join(_attention(layer, query, kind) for query in _queries(layer))
    return (
        f"{_differing(layers)}"
        f"    StackLayout({kind!r}, owner={owner!r}, layers={path!r}, attentions=(\n"
        f"{attentions}    ),\n"
        f"{_block(layers, base.config)}    ),\n"
    )


def _differing(layers: nn.ModuleList) -> str:
    kinds = sorted({type(layer).__name__ for layer in layers})
    why = "every path must be in each of them"
    return _comment(f"the layers are {', '.join(kinds)}: {why}", 4) if len(kinds) > 1 else ""


def _comment(text: str, indent: int = 8) -> str:
    return f"{' ' * indent}# {text}\n"


def _attention(layer: nn.Module, query: str, kind: str) -> str:
    module = query.rpartition(".")[0]
    kind = "cross" if _CROSS.search(module) else kind
    under = module + "." if module else ""
    keys, values, out = (_first(layer, role, under) for role in ("k", "v", "out"))
    if out == UNKNOWN and "." in module:  # BERT has it beside the attention, not in it
        out = _first(layer, "out", module.rpartition(".")[0] + ".")
    joined = query if query in _paths(layer, "qkv") else None
    why = "" if joined is None else _comment(
        f"{joined} holds q, k and v: {joined + ':q'!r}, ':k', ':v' where all rows of q come first,"
        " then those of k, then those of v; rows sorted by head cannot be named"
    )  # fmt: skip
    three = (UNKNOWN,) * 3 if joined else (query, keys, values)
    names = ", ".join(map(repr, (kind, module, *three, out)))
    return f"{why}        AttentionLayout({names}),\n"


def _block(layers: nn.ModuleList, config) -> str:
    """The line of the feed-forward block, and comments on parts that a layout cannot name."""
    layer = layers[0]
    experts = sorted({path for each in layers for path in experts_in(each)})
    if experts:
        return (
            _comment("a shared expert, or the experts of one layer, are not its block")
            + f"        ffn=None, no_ffn={why_no_block(experts[:3])!r},\n"
        )
    blocks = {path.rpartition(".")[0] for path in _paths(layer, "in_proj")}
    if len(blocks) > 1:
        return (
            _comment(f"{len(blocks)} blocks in a layer ({', '.join(sorted(blocks))}): which one?")
            + f"        ffn={UNKNOWN!r},\n"
        )
    return _ffn(layers, config)


def why_no_block(experts: list[str]) -> str:
    """Why a layer with these experts has no block."""
    return f"{', '.join(experts)}: experts that a router chooses; put the method on the attention"


def experts_in(layer: nn.Module) -> list[str]:
    """Paths of the modules that make a layer a mixture of experts."""
    return [
        path for path, module in layer.named_modules()
        if path and (_EXPERTS.search(path.rpartition(".")[2]) or "Experts" in type(module).__name__)
    ]  # fmt: skip


def _ffn(layers: nn.ModuleList, config) -> str:
    layer = layers[0]
    into, out = (_first(layer, role) for role in ("in_proj", "out_proj"))
    parent = into.rpartition(".")[0]
    under = parent + "." if parent else ""
    gate, activation = (_first(layer, role, under) for role in ("gate_proj", "activation"))
    if activation == UNKNOWN:  # no module: a function, as an attribute of the block
        names = (under + name for name in NAMES["activation"])
        activation = next((path for path in names if has(layer, path)), UNKNOWN)
    entry = parent if parent and parent == out.rpartition(".")[0] else into
    name = next((key for key in CONFIG if getattr(config, key, None)), UNKNOWN)
    layout = FFNLayout(entry, into, out, activation, name, None if gate == UNKNOWN else gate)
    dropouts, why = _dropouts(layer, layout)
    lacking = [f"{i}.{path}" for i, each in enumerate(layers) for path in (into, out)
               if into != UNKNOWN and not has(each, path)]  # fmt: skip
    if lacking:
        why += _comment(f"not in every layer: {', '.join(lacking[:3])} {UNKNOWN!r}")
    more = "" if layout.gate_proj is None else f", gate_proj={gate!r}"
    more += "".join(f", {key}={value!r}" for key, value in dropouts.items())
    return (
        f"{why}        ffn=FFNLayout({entry!r}, {into!r}, {out!r}, {activation!r},"
        f" config_activation={name!r}{more}),\n"
    )


def _dropouts(layer: nn.Module, layout: FFNLayout) -> tuple[dict, str]:
    """The block's dropouts by the layout's names, and a comment on those without a name."""
    if UNKNOWN in (layout.entry, layout.in_proj, layout.out_proj):
        return {}, ""
    if not layout.is_container:
        attentions = dict.fromkeys(path.rpartition(".")[0] for path in _queries(layer))
        return spelled_out(layer, tuple(attentions)), ""
    dropouts = _by_order(layer, layout)
    named = FFNLayout(layout.entry, layout.in_proj, layout.out_proj, layout.activation, "",
                      layout.gate_proj, **dropouts)  # fmt: skip
    rest = [path for path in unnamed_in_block(layer, named) if layout.activation != UNKNOWN]
    if not rest:
        return dropouts, ""
    return dropouts, _comment(
        f"no layout names {', '.join(rest)}: the block runs its own forward, an adapter beside it"
    )


def spelled_out(layer: nn.Module, attentions: tuple[str, ...]) -> dict:
    """The dropouts of a layer that spells its block out and holds probabilities, by their names;
    inject's self-test checks them. ``attentions`` are the paths of its attention modules."""
    dropouts: dict = {}
    if isinstance(getattr(layer, "activation_dropout", None), float):
        dropouts["activation_dropout"] = "activation_dropout"
    if isinstance(getattr(layer, "dropout", None), float):
        dropouts["output_dropout"] = "dropout"
        dropouts["output_dropout_also"] = attentions
    return dropouts


def _by_order(layer: nn.Module, layout: FFNLayout) -> dict:
    """By the order in which a block calls its modules: before or after the last projection. Empty
    where the block cannot be run."""
    block, calls, handles = layer.get_submodule(layout.entry), [], []

    def record(path: str):
        return lambda *_: calls.append(path)

    for path, module in block.named_modules(prefix=layout.entry):
        handles.append(module.register_forward_hook(record(path)))
    weight = layer.get_submodule(layout.in_proj).weight
    width = getattr(layer.get_submodule(layout.in_proj), "in_features", weight.shape[0])
    try:
        with torch.no_grad(), torch.random.fork_rng():
            block(weight.new_zeros(1, 1, width))
    except Exception:  # a block that needs more than its input cannot be run here
        return {}
    finally:
        for handle in handles:
            handle.remove()
    dropouts = [path for path in calls if isinstance(layer.get_submodule(path), nn.Dropout)]
    if layout.out_proj not in calls or len(set(dropouts)) != len(dropouts):
        return {}
    at = calls.index(layout.out_proj)
    names = ["output_dropout" if calls.index(path) > at else "activation_dropout"
             for path in dropouts]  # fmt: skip
    return dict(zip(names, dropouts)) if len(set(names)) == len(names) else {}
