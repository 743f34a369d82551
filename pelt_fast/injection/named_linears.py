"""The linear layers that a LoRA names: all of them, endings of names, or a regular expression.

The names are those of the model that inject was given, as in PEFT. No layout is needed: the model
may be any ``nn.Module``.
"""

import difflib
import logging
import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from pelt_fast.config import Modification
from pelt_fast.config.named_modules import ALL_LINEAR, LINEARS
from pelt_fast.layouts.lookup import task_head
from pelt_fast.layouts.names import compiled_from, modules_of
from pelt_fast.modules.projection_view import ProjectionView, is_linear

logger = logging.getLogger("pelt_fast")

_NO_LINEAR = (
    ((nn.Embedding, nn.EmbeddingBag), "it looks rows up, and reads no input that a factor could"),
    ((nn.modules.conv._ConvNd,), "a convolution is no product of its input and a matrix, and has"
     " other dimensions where it is one (1x1)"),
    ((nn.MultiheadAttention,), "it reads its weights itself, without calling a layer"),
)  # fmt: skip
# modules that read the weights of their linear layers without calling them, and the layers' names
_READERS = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)
_SHOWN = 3  # names in a message


def named_linears(model: nn.Module, modification: Modification) -> dict[str, nn.Module]:
    """The linear layers of a modification by name, each as a site takes it.

    Raises ValueError for a name that matches nothing, or something that is no linear layer.
    """
    named = {name: compiled_from(m) for name, m in modules_of(model).items() if name}
    wanted = modification.modules
    if wanted == ALL_LINEAR:
        found = _all_linear(model, named)
    elif isinstance(wanted, str):
        found = {name: m for name, m in named.items() if re.fullmatch(wanted, name)}
    else:
        found = _with_endings(named, wanted, type(model).__name__)
    if not found:
        kind = f"targets: {type(model).__name__} has no linear layer"
        raise ValueError(f"{kind}{'' if wanted == ALL_LINEAR else f' {wanted!r}'}{_some(named)}")
    found = _in_layers(found, modification.layers)
    for name, module in found.items():
        _check(named, name, module)
    return {name: _as_linear(module) for name, module in found.items()}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or is_linear(module)


def _as_linear(module: nn.Module) -> nn.Module:
    """A linear layer (N, K): of one that is stored transposed, the view of all of it."""
    return ProjectionView(module, "", None) if isinstance(module, Conv1D) else module


def _all_linear(model: nn.Module, named: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Every linear layer but the output layer, the task head's, those inside of another library's
    layer (PEFT's), and those that are never called."""
    outside = {part for child in heads_of(model).values() for part in child.modules()}
    for module in named.values():
        if "base_layer" in module._modules:
            outside |= {part for part in module.modules() if part is not module}
    getter = getattr(model, "get_output_embeddings", None)
    outside.add(None if getter is None else getter())
    found = {}
    for name, module in named.items():
        if not _is_linear(module) or module in outside:
            continue
        reader = _reader(named, name)
        if reader is None:
            found[name] = module
        else:
            logger.warning("no LoRA on %s: the %s around it reads its weight itself", name, reader)
    return found


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """The task head. Which part of a model that is not transformers' is a head, nobody says."""
    return task_head(model) if hasattr(model, "config") else {}


def _with_endings(
    named: dict[str, nn.Module], endings: Iterable[str], kind: str
) -> dict[str, nn.Module]:
    """The modules whose names are, or end in a dot and, one of ``endings``."""
    matched = {
        ending: {name for name in named if f".{name}".endswith(f".{ending}")} for ending in endings
    }
    missing = [ending for ending, names in matched.items() if not names]
    if missing:
        ending = min(missing, key=LINEARS.__contains__)  # a module's name first
        raise ValueError(f"targets: {kind} has no module {ending!r}{_hint(ending, named)}")
    chosen = set().union(*matched.values())
    return {name: module for name, module in named.items() if name in chosen}


def _hint(ending: str, named: dict[str, nn.Module]) -> str:
    if ending in LINEARS:
        return f"; it is the paper's {LINEARS[ending]} where no target is a module's name"
    return near(ending, named)


def near(text: str, named: dict[str, nn.Module]) -> str:
    """The names of linear layers, or their endings of as many steps, that ``text`` may mean."""
    steps = text.count(".") + 1
    linears = [name for name, module in named.items() if _is_linear(module)]
    endings = dict.fromkeys(".".join(name.split(".")[-steps:]) for name in linears)
    found = difflib.get_close_matches(text, endings, _SHOWN)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else _some(named)


def _some(named: dict[str, nn.Module]) -> str:
    """What the names of the linear layers end in."""
    linears = [name.split(".")[-1] for name, module in named.items() if _is_linear(module)]
    endings = list(dict.fromkeys(linears))
    return f": its linear layers end in {', '.join(endings[:12])}" if endings else ""


def _in_layers(found: dict[str, nn.Module], layers: tuple[int, ...] | None) -> dict[str, nn.Module]:
    """Those in the layers: the first number in a name is its layer."""
    if layers is None:
        return found
    numbers = {name: re.search(r"(?:^|\.)(\d+)(?=\.|$)", name) for name in found}
    indices = {name: int(match[1]) for name, match in numbers.items() if match}
    missing = [layer for layer in layers if layer not in indices.values()]
    if missing:
        there = sorted(set(indices.values()))
        raise ValueError(
            f"layers: there is no layer {missing[0]}: the modules with these names are in"
            f" {f'the layers {there[0]} to {there[-1]}' if there else 'no numbered layer'}"
        )
    return {name: found[name] for name, index in indices.items() if index in layers}


def _check(named: dict[str, nn.Module], name: str, module: nn.Module) -> None:
    """ValueError for a module that cannot carry a LoRA."""
    what = f"{name} is a {type(module).__name__}"
    for kinds, why in _NO_LINEAR:
        if isinstance(module, kinds):
            raise ValueError(f"{what}: LoRA needs a linear layer; {why}")
    if not _is_linear(module):
        raise ValueError(f"{what}: LoRA needs a linear layer")
    reader = _reader(named, name)
    if reader is not None:
        raise ValueError(f"{name}: the {reader} around it reads its weight without calling it")


def _reader(named: dict[str, nn.Module], name: str) -> str | None:
    """The class of the module around a linear layer that never calls it, or None."""
    around, _, last = name.rpartition(".")
    for kind, names in _READERS:
        if isinstance(named.get(around), kind) and last in names:
            return type(named[around]).__name__
    return None
