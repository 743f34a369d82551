"""The parts of a layer that its layout does not name. A site that runs instead of the layer would
leave them out."""

from collections.abc import Iterator

from torch import nn

from .layout import FFNLayout, StackLayout
from .lookup import find


def unnamed_in_block(layer: nn.Module, layout: FFNLayout) -> list[str]:
    """Paths, from ``layer``, of all parts of the block's module that the layout does not name:
    modules, parameters, buffers, factors. Empty if the layer spells the block out."""
    if not layout.is_container:
        return []
    named = set(_paths(layout))
    return [path for path in _held(find(layer, layout.entry), layout.entry) if path not in named]


def why_beside(layer: nn.Module, layout: FFNLayout) -> str | None:
    """Why a block must run its own forward, with the adapter beside it; None if the layout names
    all its parts."""
    unnamed = ", ".join(unnamed_in_block(layer, layout)[:4])
    return f"its block holds {unnamed}, which the row does not name" if unnamed else None


def unnamed_in_layer(layer: nn.Module, stack: StackLayout) -> list[str]:
    """Paths, from ``layer``, of innermost modules that the layout does not name and pelt_fast did
    not add."""
    named = _named_in(stack)
    return [
        path for path, module in layer.named_modules()
        if path and path not in named and not list(module.children())
        and not any(step.startswith("pelt_") for step in path.split("."))
    ]  # fmt: skip


def unnamed_dropouts(layer: nn.Module, stack: StackLayout) -> list[str]:
    """Paths of a layer's dropouts that the layout does not name: modules, and float attributes."""
    return [path for path in _dropouts(layer) if path not in _named_in(stack)]


def _dropouts(layer: nn.Module) -> Iterator[str]:
    for path, module in layer.named_modules():
        if "pelt_" in path:
            continue
        if isinstance(module, nn.Dropout):
            yield path
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                yield f"{path}.{name}".removeprefix(".")


def _named_in(stack: StackLayout) -> set[str]:
    named = {path for attention in stack.attentions for path in _attention_paths(attention)}
    if stack.ffn is None:
        return named
    # beside the block, so no part of it: _paths has none of it
    after = {stack.ffn.norm_after} if stack.ffn.norm_after else set()
    return named | set(_paths(stack.ffn)) | after


def _held(block: nn.Module, path: str) -> Iterator[str]:
    """Paths of the parts of ``block``: its own tensors and numbers, and its innermost modules."""
    for name in _own_values(block):
        yield f"{path}.{name}"
    for name, child in block.named_children():
        below = f"{path}.{name}"
        if type(child) is nn.Identity or "pelt_" in name:
            continue
        if any("pelt_" not in inner for inner, _ in child.named_children()):
            yield from _held(child, below)
        else:
            yield below


def _own_values(module: nn.Module) -> list[str]:
    """Names of a module's own tensors, and of numbers that may be factors or dropouts."""
    tensors = [name for name, tensor in (*module._parameters.items(), *module._buffers.items())
               if tensor is not None]  # fmt: skip
    numbers = [name for name, value in vars(module).items()
               if isinstance(value, float) and not name.startswith("_")]  # fmt: skip
    return tensors + numbers


def _paths(layout: FFNLayout) -> Iterator[str]:
    named = (layout.entry, layout.in_proj, layout.out_proj, layout.gate_proj, layout.activation,
             layout.activation_dropout, layout.output_dropout, layout.norm)  # fmt: skip
    return (path.partition(":")[0] for path in named if path)


def _attention_paths(layout) -> Iterator[str]:
    named = (layout.module, layout.q, layout.k, layout.v, layout.out)
    return (path.partition(":")[0] for path in named if path)
