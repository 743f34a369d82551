"""Where a model keeps what the methods modify: the words of the architecture table, and its reader.

Paths are attribute paths: a stack's from the base model, everything else from one layer. A
projection that shares its matrix is a part of it: "attn.c_attn:q" of fused q, k and v,
"mlp.gate_up_proj:0/2" the first of two; ":" alone is all of a Conv1D, whose weight lies transposed.
The rows are in ``architectures``; a :class:`Layout` of the user's makes one more.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionLayout:
    """One attention of a layer. ``module`` calls the attention interface; ``out`` is the output
    projection, whose result the model drops out and adds to the residual."""

    kind: str  # "encoder", "decoder" or "cross"
    module: str
    q: str
    k: str
    v: str
    out: str


@dataclass(frozen=True)
class FFNLayout:
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
class PromptLayout:
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
class StackLayout:
    """A stack of like layers. ``owner`` runs once per forward of the stack, before its layers."""

    kind: str  # "encoder" or "decoder"
    owner: str  # "" is the base model itself
    layers: str
    attentions: tuple[AttentionLayout, ...]
    ffn: FFNLayout | None
    prompt: PromptLayout | None = None
    no_ffn: str = ""  # why nothing can be put on the blocks, where ``ffn`` is None


@dataclass(frozen=True)
class Layout:
    """One row of the table: the stacks of a model whose config has this ``model_type``.

    Hand one of your own to :func:`pelt_fast.inject` for an architecture that has no row, or lays
    its layers out in another way; ``pelt-fast explain MODEL`` prints a draft.
    """

    model_type: str
    stacks: tuple[StackLayout, ...]
