"""The stacks of a model, and the modules at a layout's paths."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from pelt_fast.modules.projection_view import view_of

from .known_forwards import own_file, why_foreign
from .layout import FFNLayout, Layout, StackLayout
from .names import compiled_from, is_method
from .parts import Parts, used, used_of
from .table import ROWS, rows_of


def find(module: nn.Module, path: str):
    """The attribute at ``path``; AttributeError when a step is missing. A path that ends in
    ":name" gives a :class:`~pelt_fast.modules.projection_view.ProjectionView`: some rows of that
    projection."""
    path, colon, name = path.partition(":")
    parent = module
    for step in path.split(".") if path else ():
        parent, module = module, compiled_from(getattr(module, step))
    return view_of(module, name, getattr(parent, "config", None)) if colon else module


def has(module: nn.Module, path: str) -> bool:
    """Whether :func:`find` would succeed."""
    try:
        find(module, path)
    except AttributeError:
        return False
    return True


class NoRow(ValueError):
    """The table has no row for a model's architecture."""


def stacks_of(
    model: nn.Module, layout: Layout | None = None, parts: Parts | None = None
) -> list[StackLayout]:
    """The stacks of ``model`` as ``layout`` names them, or as the method in it found them, or as
    the first row of the table that fits.

    ``parts`` are the parts that a method uses (:func:`pelt_fast.layouts.parts.parts_of`). Only
    these must be there; None is all of them. Every layer must have them.

    Raises TypeError if it is no transformers model or no Layout, NoRow when the table has no row
    for the architecture, and ValueError when none fits: the message says which paths are missing.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise TypeError(f"model must be a transformers model with a config, got {type(model)}")
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {type(layout).__name__}")
    if layout is not None and layout.model_type != model_type:
        raise ValueError(f"layout is for {layout.model_type!r}, the model is {model_type!r}")
    layout = getattr(getattr(model, "_pelt", None), "layout", None) if layout is None else layout
    base, rows = base_of(model), rows_of(model) if layout is None else [layout]
    if not rows:
        raise NoRow(_no_row(model_type))
    missing = []
    for row in rows:
        present = [used(stack, parts) for stack in row.stacks if has(base, stack.layers)]
        absent = [path for stack in present for path in missing_paths(base, stack, parts)]
        if present and not absent:
            return present
        missing = missing or absent or [stack.layers for stack in row.stacks]
    raise ValueError(
        f"{type(model).__name__} does not fit the table row {model_type!r}: looked for"
        f" {', '.join(missing)} in {type(base).__name__}"
    )


def _no_row(model_type: str) -> str:
    known = ", ".join(sorted({row.model_type for row in ROWS}))
    return (
        f"no table row for architecture {model_type!r} (known: {known}). A row names each"
        " stack's layers, and in a layer the attention's q, k, v and output projections and"
        " the FFN's in, out and gate projections, activation and dropouts: pass one as"
        " inject(..., layout=Layout(...)); pelt-fast explain prints a draft"
    )


def layers_of(base: nn.Module, stack: StackLayout) -> Iterator[tuple[int, nn.Module]]:
    """The layers of a stack, each with its index in the list."""
    for index, layer in enumerate(find(base, stack.layers)):
        if stack.only is None or index in stack.only:
            yield index, layer


def missing_paths(base: nn.Module, stack: StackLayout, parts: Parts | None = None) -> Iterator[str]:
    """The paths of ``parts`` that the stack names and one of its layers lacks, each once."""
    seen: set[str] = set()
    for index, layer in layers_of(base, stack):
        for path in _named_paths(base, layer, stack, parts):
            if path not in seen and not has(layer, path):
                seen.add(path)
                yield f"{stack.layers}.{index}.{path}"


def _named_paths(
    base: nn.Module, layer: nn.Module, stack: StackLayout, parts: Parts | None
) -> Iterator[str]:
    """The paths that a layer must have."""
    ffn, paths = stack.ffn, []
    if ffn is not None:
        paths += [ffn.entry, ffn.in_proj, ffn.out_proj, ffn.gate_proj, ffn.norm, ffn.norm_after]
        paths += ffn.output_dropout_also
        if not _runs_itself(base, layer, ffn):
            paths += [ffn.activation, ffn.activation_dropout, ffn.output_dropout]
    for attention in stack.attentions:
        paths += [getattr(attention, part) for part in used_of(attention, parts)]
    return filter(None, paths)


def _runs_itself(base: nn.Module, layer: nn.Module, ffn: FFNLayout) -> bool:
    """Whether a block has an unknown forward. Such a block need not have the pieces that are
    named."""
    is_block = has(layer, ffn.entry) and ffn.is_container
    return is_block and why_foreign(find(layer, ffn.entry), own_file(base)) is not None


def base_of(model: nn.Module) -> nn.Module:
    """The model without its task head."""
    return compiled_from(getattr(model, "base_model", model))


# the names of task heads, if no other fact tells a head from the base
_HEADS = frozenset((
    "classifier", "classification_head", "cls_classifier", "ctc_head", "distillation_classifier",
    "fc", "head", "pre_classifier", "projector", "qa_outputs", "score",
))  # fmt: skip


_PARTS = ("embeddings", "encoder", "backbone", "tower")  # in the names of children that are no head


def task_head(model: nn.Module) -> dict[str, nn.Module]:
    """The children of ``model`` that make the task head, by name.

    They are all children except the base model, its parts, and the output embeddings, which belong
    to the base. A class without a task (transformers' ``..Model`` and ``..Backbone``) has none. Of
    a model that is its own base, or whose base is no transformers model, only children with the
    names of heads count.
    """
    base = base_of(model)
    if _is_bare(type(model)):
        return {}
    getter = getattr(model, "get_output_embeddings", None)
    embeddings = getter() if getter is not None else None
    is_told = base is not model and isinstance(base, PreTrainedModel)
    return {
        name: child
        for name, child in model.named_children()
        if compiled_from(child) is not base and not is_method(name)
        and all(module is not embeddings for module in child.modules())
        and (is_told or name in _HEADS) and not _is_part(name, child)
    }  # fmt: skip


def _is_bare(kind: type) -> bool:
    """Whether this is a class of transformers without a task."""
    ends = kind.__name__.endswith(("Model", "Backbone")) and "Head" not in kind.__name__
    return kind.__module__.startswith("transformers.") and ends


def _is_part(name: str, child: nn.Module) -> bool:
    """Whether a child belongs to the base: it is a model itself, embeds, or encodes."""
    kinds = (PreTrainedModel, nn.Embedding)
    named = any(part in name for part in _PARTS)
    return named or any(isinstance(module, kinds) for module in child.modules())
