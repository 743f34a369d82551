"""The architecture table: where each model keeps what the methods modify.

Paths are attribute paths: a stack's from the base model, everything else from one layer. A new
architecture is a new row; models whose layers are laid out alike share one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


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
    the layer spells the block out. ``activation`` is the module or attribute of the activation
    and ``config_activation`` the config's name for it. A dropout is a module or a float attribute;
    ``output_dropout_also`` names the attentions whose output the same float drops. ``norm`` is the
    norm in front of a pre-norm block, whose input is the residual stream; ``adapter_reads`` what a
    parallel adapter reads there in the paper's code, "input" or "residual".
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

    @property
    def is_container(self) -> bool:
        """Whether ``entry`` runs the whole block, so that nothing of it is called elsewhere."""
        return self.entry != self.in_proj


@dataclass(frozen=True)
class PromptSlot:
    """How a prompt gets in front of a stack's tokens; every path from the base model.

    ``norm``: the LayerNorm of the summed embeddings, in front of which the prompt is put;
    ``strip``: the module whose output is without it again. Else it is put in front of the token
    embeddings of ``owner``, and ``positions`` is the module that gives learned positions, of which
    the prompt gets none (None: rotary, where it takes the first).
    """

    norm: str | None = None
    strip: str | None = None
    positions: str | None = None


@dataclass(frozen=True)
class StackSlot:
    """A stack of like layers. ``owner`` runs once per forward of the stack, before its layers."""

    kind: str  # "encoder" or "decoder"
    owner: str  # "" is the base model itself
    layers: str
    attentions: tuple[AttentionSlot, ...]
    ffn: FFNSlot
    prompt: PromptSlot | None = None


def _bert_row() -> tuple[StackSlot, ...]:
    attention = AttentionSlot(
        "encoder", "attention.self", "attention.self.query", "attention.self.key",
        "attention.self.value", "attention.output.dense",
    )  # fmt: skip
    ffn = FFNSlot(
        "intermediate.dense", "intermediate.dense", "output.dense",
        "intermediate.intermediate_act_fn", "hidden_act", output_dropout="output.dropout",
    )  # fmt: skip
    prompt = PromptSlot(norm="embeddings.LayerNorm", strip="encoder")
    return (StackSlot("encoder", "encoder", "encoder.layer", (attention,), ffn, prompt),)


def _bart_attention(kind: str, module: str) -> AttentionSlot:
    names = (f"{module}.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    return AttentionSlot(kind, module, *names)


def _bart_ffn(*attentions: str, **pre_norm: str) -> FFNSlot:
    return FFNSlot(
        "fc1", "fc1", "fc2", "activation_fn", "activation_function",
        activation_dropout="activation_dropout", output_dropout="dropout",
        output_dropout_also=attentions, **pre_norm,
    )  # fmt: skip


def _bart_row(**pre_norm: str) -> tuple[StackSlot, ...]:
    own, cross = "self_attn", "encoder_attn"
    encoder = (_bart_attention("encoder", own),)
    decoder = (_bart_attention("decoder", own), _bart_attention("cross", cross))
    prompt = PromptSlot(positions="encoder.embed_positions")
    ffns = _bart_ffn(own, **pre_norm), _bart_ffn(own, cross, **pre_norm)
    return (
        StackSlot("encoder", "encoder", "encoder.layers", encoder, ffns[0], prompt),
        StackSlot("decoder", "decoder", "decoder.layers", decoder, ffns[1]),
    )


def _llama_row() -> tuple[StackSlot, ...]:
    attention = AttentionSlot(
        "decoder", "self_attn", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj",
    )  # fmt: skip
    ffn = FFNSlot(
        "mlp", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "hidden_act",
        gate_proj="mlp.gate_proj", norm="post_attention_layernorm",
    )  # fmt: skip
    return (StackSlot("decoder", "", "layers", (attention,), ffn, PromptSlot()),)


def _t5_row() -> tuple[StackSlot, ...]:
    """T5 with a plain FFN (v1.0, t5-small to t5-11b); a gated one has no row yet."""

    def attention(kind: str, module: str) -> AttentionSlot:
        return AttentionSlot(kind, module, *(f"{module}.{name}" for name in "qkvo"))

    def ffn(index: int) -> FFNSlot:
        block = f"layer.{index}.DenseReluDense"
        return FFNSlot(
            block, f"{block}.wi", f"{block}.wo", f"{block}.act", "dense_act_fn",
            activation_dropout=f"{block}.dropout", norm=f"layer.{index}.layer_norm",
        )  # fmt: skip

    own, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    decoder = (attention("decoder", own), attention("cross", cross))
    return (
        StackSlot("encoder", "encoder", "encoder.block", (attention("encoder", own),), ffn(1)),
        StackSlot("decoder", "decoder", "decoder.block", decoder, ffn(2)),
    )


ARCHITECTURES: dict[str, tuple[StackSlot, ...]] = {
    "bart": _bart_row(),
    "bert": _bert_row(),
    "llama": _llama_row(),
    "mbart": _bart_row(norm="final_layer_norm", adapter_reads="residual"),
    "roberta": _bert_row(),
    "t5": _t5_row(),
}


def find(module: nn.Module, path: str):
    """The attribute at ``path``; AttributeError when a step is missing."""
    for step in path.split(".") if path else ():
        module = getattr(module, step)
    return module


def has(module: nn.Module, path: str) -> bool:
    """Whether :func:`find` would succeed."""
    try:
        find(module, path)
    except AttributeError:
        return False
    return True


def stacks_of(model: nn.Module) -> list[StackSlot]:
    """The rows of the table that ``model`` has.

    Raises ValueError when there is no row for its architecture, or the row does not fit: the
    message says which slots were looked for and how to add them.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise TypeError(f"model must be a transformers model with a config, got {type(model)}")
    base = base_of(model)
    rows = ARCHITECTURES.get(model_type)
    if rows is None:
        raise ValueError(
            f"no table row for architecture {model_type!r} (known: {', '.join(ARCHITECTURES)})."
            " A row names each stack's layers, and in a layer the attention's q, k, v and output"
            " projections and the FFN's in, out and gate projections, activation and dropouts:"
            " add one to pelt_fast.models.slots.ARCHITECTURES"
        )
    present = [stack for stack in rows if has(base, stack.layers)]
    missing = [path for stack in present for path in _missing_paths(base, stack)]
    if not present or missing:
        looked_for = missing or [stack.layers for stack in rows]
        raise ValueError(
            f"{type(model).__name__} does not fit the table row {model_type!r}: looked for"
            f" {', '.join(looked_for)} in {type(base).__name__}"
        )
    return present


def _missing_paths(base: nn.Module, stack: StackSlot) -> Iterator[str]:
    layer = find(base, stack.layers)[0]
    ffn = stack.ffn
    paths = [ffn.entry, ffn.in_proj, ffn.out_proj, ffn.gate_proj, ffn.activation,
             ffn.activation_dropout, ffn.output_dropout, ffn.norm]  # fmt: skip
    for attention in stack.attentions:
        paths += [attention.module, attention.q, attention.k, attention.v, attention.out]
    return (f"{stack.layers}.0.{path}" for path in paths if path and not has(layer, path))


def base_of(model: nn.Module) -> nn.Module:
    """The model without its task head."""
    return getattr(model, "base_model", model)


def task_head(model: nn.Module) -> dict[str, nn.Module]:
    """The children of ``model`` that make the task head: all but the base model and what holds
    the output embeddings, which are the base's own."""
    base = base_of(model)
    if base is model:
        return {}
    getter = getattr(model, "get_output_embeddings", None)
    embeddings = getter() if getter is not None else None
    return {
        name: child
        for name, child in model.named_children()
        if child is not base and all(module is not embeddings for module in child.modules())
    }
