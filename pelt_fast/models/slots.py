"""Where a model keeps what the methods modify: the words of the architecture table, and its reader.

Paths are attribute paths: a stack's from the base model, everything else from one layer. A
projection that shares its matrix is a part of it: "attn.c_attn:q" of fused q, k and v,
"mlp.gate_up_proj:0/2" the first of two; ":" alone is all of a Conv1D, whose weight lies transposed.
The rows are in ``architectures``; a :class:`SlotMap` of the user's makes one more.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from pelt_fast.modules.part import part_of

from .handles import compiled_from
from .known import own_file, why_foreign


@dataclass(frozen=True)
class AttentionSlot:
    """One attention of a layer. ``module`` calls the attention interface; ``out`` is the output
    projection, whose result the model drops out and adds to the residual."""

    kind: str  # "encoder", "decoder" or "cross"
    module: str
    q: str
    k: str
    v: str
    out: str


@dataclass(frozen=True)
class FFNSlot:
    """The feed-forward block of a layer.

    ``entry`` is the module whose call is taken over: the block's own module, or ``in_proj`` where
    the layer spells the block out. ``activation`` is the module or attribute of the activation; the
    config's name for it, ``config_activation``, is there for rows written before and is not read.
    A dropout is a module or a float attribute; ``output_dropout_also`` names the attentions whose
    output the same float drops. ``norm`` is the norm in front of a pre-norm block, whose input is
    the residual stream; ``adapter_reads`` what a parallel adapter reads there in the paper's code,
    "input" or "residual"; ``norm_after`` the norm behind a post-norm block, which reads the sum of
    the block and its input.
    """

    entry: str
    in_proj: str
    out_proj: str
    activation: str
    config_activation: str
    gate_proj: str | None = None
    activation_dropout: str | None = None
    output_dropout: str | None = None
    output_dropout_also: tuple[str, ...] = ()
    norm: str | None = None
    adapter_reads: str = "input"
    norm_after: str | None = None

    @property
    def is_container(self) -> bool:
        """Whether ``entry`` runs the whole block, so that nothing of it is called elsewhere."""
        return self.entry != self.in_proj


@dataclass(frozen=True)
class PromptSlot:
    """How a prompt gets in front of a stack's tokens; every path from the base model.

    ``norm``: the LayerNorm of the summed embeddings, in front of which the prompt is put;
    ``own_mask`` says that the model makes a mask of the ids' shape where it gets none. ``layer``:
    the first layer, in front of which it is put where what is embedded is no tokens. Else it is put
    in front of the token embeddings of ``owner``, and ``positions`` is the module that gives
    learned positions, of which the prompt gets none (None: relative positions, where it takes the
    first). ``strip``: the module whose output is without it again (None: a decoder's own output; an
    encoder's goes to its decoder with it).
    """

    norm: str | None = None
    strip: str | None = None
    positions: str | None = None
    layer: str | None = None
    own_mask: bool = False


@dataclass(frozen=True)
class StackSlot:
    """A stack of like layers. ``owner`` runs once per forward of the stack, before its layers."""

    kind: str  # "encoder" or "decoder"
    owner: str  # "" is the base model itself
    layers: str
    attentions: tuple[AttentionSlot, ...]
    ffn: FFNSlot | None
    prompt: PromptSlot | None = None
    no_ffn: str = ""  # why nothing can be put on the blocks, where ``ffn`` is None


@dataclass(frozen=True)
class SlotMap:
    """One row of the table: the stacks of a model whose config has this ``model_type``.

    Hand one of your own to :func:`pelt_fast.inject` for an architecture that has no row, or lays
    its layers out in another way; ``pelt-fast explain MODEL`` prints a draft.
    """

    model_type: str
    stacks: tuple[StackSlot, ...]


def find(module: nn.Module, path: str):
    """The attribute at ``path``; AttributeError when a step is missing. A path that ends in
    ":name" is a :class:`Part` of what lies there."""
    path, colon, name = path.partition(":")
    parent = module
    for step in path.split(".") if path else ():
        parent, module = module, compiled_from(getattr(module, step))
    return part_of(module, name, getattr(parent, "config", None)) if colon else module


def has(module: nn.Module, path: str) -> bool:
    """Whether :func:`find` would succeed."""
    try:
        find(module, path)
    except AttributeError:
        return False
    return True


def stacks_of(model: nn.Module, slots: SlotMap | None = None) -> list[StackSlot]:
    """The stacks of ``model`` as ``slots`` names them, else the first row of the table that fits.

    Raises TypeError for what is no transformers model or no SlotMap, ValueError when there is no
    row for its architecture, or none fits: the message says which slots were looked for and how to
    add them.
    """
    from .architectures import ROWS, rows_of  # they are made of these classes

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise TypeError(f"model must be a transformers model with a config, got {type(model)}")
    if slots is not None and not isinstance(slots, SlotMap):
        raise TypeError(f"slots must be a SlotMap, got {type(slots).__name__}")
    if slots is not None and slots.model_type != model_type:
        raise ValueError(f"slots is for {slots.model_type!r}, the model is {model_type!r}")
    base, rows = base_of(model), rows_of(model) if slots is None else [slots]
    if not rows:
        known = ", ".join(sorted({row.model_type for row in ROWS}))
        raise ValueError(
            f"no table row for architecture {model_type!r} (known: {known}). A row names each"
            " stack's layers, and in a layer the attention's q, k, v and output projections and"
            " the FFN's in, out and gate projections, activation and dropouts: pass one as"
            " inject(..., slots=SlotMap(...)); pelt-fast explain prints a draft"
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


def missing_paths(base: nn.Module, stack: StackSlot) -> Iterator[str]:
    """What the stack names and one of its layers lacks, each once."""
    seen: set[str] = set()
    for index, layer in enumerate(find(base, stack.layers)):
        for path in _named_paths(base, layer, stack):
            if path not in seen and not has(layer, path):
                seen.add(path)
                yield f"{stack.layers}.{index}.{path}"


def _named_paths(base: nn.Module, layer: nn.Module, stack: StackSlot) -> Iterator[str]:
    """What a layer must have for a method to be put on it."""
    ffn, paths = stack.ffn, []
    if ffn is not None:
        paths += [ffn.entry, ffn.in_proj, ffn.out_proj, ffn.gate_proj, ffn.norm, ffn.norm_after]
        paths += ffn.output_dropout_also
        if not _runs_itself(base, layer, ffn):
            paths += [ffn.activation, ffn.activation_dropout, ffn.output_dropout]
    for attention in stack.attentions:
        paths += [attention.module, attention.q, attention.k, attention.v, attention.out]
    return filter(None, paths)


def _runs_itself(base: nn.Module, layer: nn.Module, ffn: FFNSlot) -> bool:
    """Whether a block runs a forward that nobody knows: what it applies is its own business."""
    block = has(layer, ffn.entry) and ffn.is_container
    return block and why_foreign(find(layer, ffn.entry), own_file(base)) is not None


def base_of(model: nn.Module) -> nn.Module:
    """The model without its task head."""
    return compiled_from(getattr(model, "base_model", model))


# what heads are called where nothing else tells them from the base
_HEADS = frozenset((
    "classifier", "classification_head", "cls_classifier", "ctc_head", "distillation_classifier",
    "fc", "head", "pre_classifier", "projector", "qa_outputs", "score",
))  # fmt: skip
_PARTS = ("embeddings", "encoder", "backbone", "tower")  # in the name of what is no head


def task_head(model: nn.Module) -> dict[str, nn.Module]:
    """The children of ``model`` that make the task head: all but the base model and its parts, and
    what holds the output embeddings, which are the base's own.

    A class without a task (transformers' ``..Model`` and ``..Backbone``) has none, whatever stands
    beside its base. A model that is its own base, or whose base is no model of transformers', has
    what is named as heads are.
    """
    base = base_of(model)
    if _is_bare(type(model)):
        return {}
    getter = getattr(model, "get_output_embeddings", None)
    embeddings = getter() if getter is not None else None
    told = base is not model and isinstance(base, PreTrainedModel)
    return {
        name: child
        for name, child in model.named_children()
        if compiled_from(child) is not base
        and all(module is not embeddings for module in child.modules())
        and (told or name in _HEADS) and not _is_part(name, child)
    }  # fmt: skip


def _is_bare(kind: type) -> bool:
    """Whether a class of transformers' is a base alone."""
    ends = kind.__name__.endswith(("Model", "Backbone")) and "Head" not in kind.__name__
    return kind.__module__.startswith("transformers.") and ends


def _is_part(name: str, child: nn.Module) -> bool:
    """Whether a child belongs to a base: a model of its own, or what embeds or encodes."""
    kinds = (PreTrainedModel, nn.Embedding)
    named = any(part in name for part in _PARTS)
    return named or any(isinstance(module, kinds) for module in child.modules())
