"""The dataclasses that describe where a model keeps the modules that the methods modify.

Every field is an attribute path. Those of a stack start at the base model, all others at a layer.
Some projections share one matrix. A path then names the rows after a colon: "attn.c_attn:q" is the
query part of a matrix that holds q, k and v; "mlp.gate_up_proj:0/2" is the first of two halves;
"attn.qkv:q=0-8" is rows 0 to 7, and "attn.qkv:q=0-8%24" the first 8 rows of each 24. ":" alone is
the whole matrix of a Conv1D, which is stored transposed. The known models are in
``table``.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionLayout:
    """One attention of a layer.

    Args:
        kind: "encoder" or "decoder" (self-attention), or "cross".
        module: the module that calls the attention function.
        q: the query projection.
        k: the key projection.
        v: the value projection.
        out: the output projection. The model applies dropout to its result, and adds it to the
            residual stream.
        heads: the number of heads of the keys, and the size of one; None: the module tells them.
        unknown: of a discovered layout, each part of these that was not found, and why. A part
            that is None is one of them.

    Example:
        AttentionLayout("encoder", "attn", "attn.wq", "attn.wk", "attn.wv", "attn.wo")
    """

    kind: str
    module: str
    q: str | None
    k: str | None
    v: str | None
    out: str | None
    heads: tuple[int, int] | None = None
    unknown: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class FFNLayout:
    """The feed-forward block of a layer.

    Args:
        entry: the module whose call a method runs in: the block's own module, or ``in_proj`` where
            the layer's forward spells the block out.
        in_proj: the first projection (F, K).
        out_proj: the second projection (N, F).
        activation: the activation, a module or an attribute; None where the code of the block
            calls a function. The block then runs its own forward, an adapter beside it.
        config_activation: the config's name for the activation. It is not read any more.
        gate_proj: the gate projection of a gated block.
        activation_dropout: the dropout after the activation, a module or a float attribute.
        output_dropout: the dropout after the block, a module or a float attribute.
        output_dropout_also: the attentions whose output is dropped by the same float.
        norm: the norm before a pre-norm block. Its input is the residual stream.
        adapter_reads: the input of a parallel adapter in the paper's code: "input" (the block's)
            or "residual" (the stream before ``norm``).
        norm_after: the norm after a post-norm block. It reads the block's output plus its input.

    Example:
        FFNLayout("mlp", "mlp.up", "mlp.down", "mlp.act", "hidden_act", norm="ln_2")
    """

    entry: str
    in_proj: str
    out_proj: str
    activation: str | None
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
        """Whether ``entry`` runs the whole block, so that no piece of it is called elsewhere."""
        return self.entry != self.in_proj


@dataclass(frozen=True)
class PromptLayout:
    """How a prompt is put in front of a stack's tokens. Every path starts at the base model.

    With neither ``norm`` nor ``layer`` the prompt goes in front of the token embeddings of the
    stack's ``owner``.

    Args:
        norm: the LayerNorm of the summed embeddings; the prompt goes in front of its input.
        strip: the module whose output loses the virtual tokens again. None: a decoder's own output
            loses them, and an encoder's output keeps them for its decoder.
        positions: the module that gives learned positions; the prompt gets none of them. None:
            positions are relative, and the prompt has the first P.
        layer: the first layer; the prompt goes in front of its input, where the model embeds
            patches or audio.
        own_mask: whether the model makes a mask of the ids' shape (B, T) when it is given none.

    Example:
        PromptLayout(positions="encoder.embed_positions")
    """

    norm: str | None = None
    strip: str | None = None
    positions: str | None = None
    layer: str | None = None
    own_mask: bool = False


@dataclass(frozen=True)
class StackLayout:
    """A stack of layers that are built alike. Layers of one list that differ are several stacks.

    Args:
        kind: "encoder" or "decoder".
        owner: the module that runs once in each forward of the stack, before its layers. "" is the
            base model itself.
        layers: the list of layers.
        attentions: the attentions of one layer.
        ffn: the feed-forward block of one layer, or None.
        prompt: how a prompt is put in front of the stack, or None.
        no_ffn: where ``ffn`` is None, why no method can be on the blocks.
        no_prompt: where ``prompt`` is None, why no prompt can be in front.
        only: the indices of the layers that are built like this; None is all of them.

    Example:
        StackLayout("decoder", "", "layers", (attention,), ffn)
    """

    kind: str
    owner: str
    layers: str
    attentions: tuple[AttentionLayout, ...]
    ffn: FFNLayout | None
    prompt: PromptLayout | None = None
    no_ffn: str = ""
    no_prompt: str = ""
    only: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """Where a model keeps its layers, attentions and feed-forward blocks.

    Give one to :func:`pelt_fast.inject` for an architecture that is not in the table, or whose
    layers are built differently, where the one that :func:`pelt_fast.inject` discovers will not
    do. ``explain`` prints that one.

    Args:
        model_type: the ``model_type`` of the model's config.
        stacks: the stacks, the encoder's first.

    Example:
        pelt_fast.inject(model, "lora", layout=Layout("my_model", (stack,)))
    """

    model_type: str
    stacks: tuple[StackLayout, ...]
