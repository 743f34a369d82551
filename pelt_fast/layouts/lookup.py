"""The stacks of a model, and the modules at a layout's paths."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from pelt_fast.modules.projection_view import view_of

from .known_forwards import own_file, why_foreign
from .layout import FFNLayout, Layout, StackLayout
from .names import compiled_from
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


def stacks_of(model: nn.Module, layout: Layout | None = None) -> list[StackLayout]:
    """The stacks of ``model`` as ``layout`` names them, or as the first row of the table that fits.

    Raises TypeError if it is no transformers model or no Layout, and ValueError when the table
    has no row for the architecture, or none that fits: the message says which paths are missing.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise TypeError(f"model must be a transformers model with a config, got {type(model)}")
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {type(layout).__name__}")
    if layout is not None and layout.model_type != model_type:
        raise ValueError(f"layout is for {layout.model_type!r}, the model is {model_type!r}")
    base, rows = base_of(model), rows_of(model) if layout is None else [layout]
    if not rows:
        known = ", ".join(sorted({row.model_type for row in ROWS}))
        raise ValueError(
            f"no table row for architecture {model_type!r} (known: {known}). A row names each"
            " stack's layers, and in a layer the attention's q, k, v and output projections and"
            " the FFN's in, out and gate projections, activation and dropouts: pass one as"
            " inject(..., layout=Layout(...)); pelt-fast explain prints a draft"
        )
    missing = []
    for row in rows:
        present = [stack for stack in row.stacks if has(base, stack.layers)]
        absent = [path for stack in present for path in missing_paths(base, stack)]
        if present and not absent:
            return present
        missing = missing or absent or [stack.layers for stack in row.stacks]
    raise ValueError(
        f"{type(model).__name__} does not fit the table row {model_type!r}: looked for"
        f" {', '.join(missing)} in {type(base).__name__}"
    )


def missing_paths(base: nn.Module, stack: StackLayout) -> Iterator[str]:
    """The paths that the stack names and one of its layers does not have, each once."""
    seen: set[str] = set()
    for index, layer in enumerate(find(base, stack.layers)):
        for path in _named_paths(base, layer, stack):
            if path not in seen and not has(layer, path):
                seen.add(path)
                yield f"{stack.layers}.{index}.{path}"


def _named_paths(base: nn.Module, layer: nn.Module, stack: StackLayout) -> Iterator[str]:
    """The paths that a layer must have."""
    ffn, paths = stack.ffn, []
    if ffn is not None:
        paths += [ffn.entry, ffn.in_proj, ffn.out_proj, ffn.gate_proj, ffn.norm, ffn.norm_after]
        paths += ffn.output_dropout_also
        if not _runs_itself(base, layer, ffn):
            paths += [ffn.activation, ffn.activation_dropout, ffn.output_dropout]
    for attention in stack.attentions:
        paths += [attention.module, attention.q, attention.k, attention.v, attention.out]
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
        if compiled_from(child) is not base
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
