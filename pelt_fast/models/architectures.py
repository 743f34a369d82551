"""The architecture table. A new architecture is a new row; those laid out alike share a function.

Where an architecture comes in variants (T5's plain and gated blocks) it has a row for each.
"""

from torch import nn

from .slots import AttentionSlot, FFNSlot, PromptSlot, SlotMap, StackSlot


def attention(kind: str, module: str, names: tuple[str, str, str, str]) -> AttentionSlot:
    """An attention whose projections are ``names`` of ``module``: q, k, v, out."""
    return AttentionSlot(kind, module, *(f"{module}.{name}" for name in names))


def _encoder(layers: str, owner: str, own: AttentionSlot, ffn: FFNSlot | None, **more) -> tuple:
    return (StackSlot("encoder", owner, layers, (own,), ffn, **more),)


def bert() -> tuple[StackSlot, ...]:
    """BERT, RoBERTa, ELECTRA."""
    own = AttentionSlot(
        "encoder", "attention.self", "attention.self.query", "attention.self.key",
        "attention.self.value", "attention.output.dense",
    )  # fmt: skip
    prompt = PromptSlot(norm="embeddings.LayerNorm", strip="encoder")
    return _encoder("encoder.layer", "encoder", own, _bert_ffn(), prompt=prompt)


def _bert_ffn() -> FFNSlot:
    return FFNSlot(
        "intermediate.dense", "intermediate.dense", "output.dense",
        "intermediate.intermediate_act_fn", "hidden_act", output_dropout="output.dropout",
        norm_after="output.LayerNorm",
    )  # fmt: skip


def deberta_v2() -> tuple[StackSlot, ...]:
    """Its attention computes itself: no prefix (``attention.check`` says so)."""
    own = AttentionSlot(
        "encoder", "attention.self", "attention.self.query_proj", "attention.self.key_proj",
        "attention.self.value_proj", "attention.output.dense",
    )  # fmt: skip
    prompt = PromptSlot(norm="embeddings.LayerNorm", strip="encoder", own_mask=True)
    return _encoder("encoder.layer", "encoder", own, _bert_ffn(), prompt=prompt)


def vit() -> tuple[StackSlot, ...]:
    """The block's output dropout is the layer's: an adapter's update is dropped with it."""
    own = attention("encoder", "attention", ("q_proj", "k_proj", "v_proj", "o_proj"))
    ffn = FFNSlot("mlp", "mlp.fc1", "mlp.fc2", "mlp.activation_fn", "hidden_act",
                  norm="layernorm_after")  # fmt: skip
    prompt = PromptSlot(layer="layers.0", strip="layernorm")
    return _encoder("layers", "", own, ffn, prompt=prompt)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _bart_ffn(
    *attentions: str, activation_dropout: str | None = "activation_dropout", **norms: str
) -> FFNSlot:
    return FFNSlot(
        "fc1", "fc1", "fc2", "activation_fn", "activation_function",
        activation_dropout=activation_dropout, output_dropout="dropout",
        output_dropout_also=attentions, **norms,
    )  # fmt: skip


_BART_PROMPT = PromptSlot(positions="encoder.embed_positions")


def bart(prompt: PromptSlot = _BART_PROMPT, **norms: str) -> tuple[StackSlot, ...]:
    """BART, mBART, Whisper."""
    own, cross = "self_attn", "encoder_attn"
    ffns = _bart_ffn(own, **norms), _bart_ffn(own, cross, **norms)
    encoder = (attention("encoder", own, PROJECTIONS),)
    decoder = (attention("decoder", own, PROJECTIONS), attention("cross", cross, PROJECTIONS))
    return (
        StackSlot("encoder", "encoder", "encoder.layers", encoder, ffns[0], prompt),
        StackSlot("decoder", "decoder", "decoder.layers", decoder, ffns[1]),
    )


def opt() -> tuple[StackSlot, ...]:
    """BART's layer in a decoder alone."""
    ffn = _bart_ffn("self_attn", activation_dropout=None, norm="final_layer_norm")
    own = (attention("decoder", "self_attn", PROJECTIONS),)
    prompt = PromptSlot(positions="decoder.embed_positions")
    return (StackSlot("decoder", "decoder", "decoder.layers", own, ffn, prompt),)


def gpt2() -> tuple[StackSlot, ...]:
    """Every projection is a Conv1D, whose weight lies transposed."""
    own = AttentionSlot(
        "decoder", "attn", "attn.c_attn:q", "attn.c_attn:k", "attn.c_attn:v", "attn.c_proj:"
    )
    ffn = FFNSlot("mlp", "mlp.c_fc:", "mlp.c_proj:", "mlp.act", "activation_function",
                  output_dropout="mlp.dropout", norm="ln_2")  # fmt: skip
    return (StackSlot("decoder", "", "h", (own,), ffn, PromptSlot(positions="wpe")),)


def phi3() -> tuple[StackSlot, ...]:
    """q, k and v are rows of one matrix, gate and up of another."""
    fused = "self_attn.qkv_proj"
    own = AttentionSlot("decoder", "self_attn", *(f"{fused}:{x}" for x in "qkv"),
                        "self_attn.o_proj")  # fmt: skip
    ffn = FFNSlot("mlp", "mlp.gate_up_proj:1/2", "mlp.down_proj", "mlp.activation_fn",
                  "hidden_act", gate_proj="mlp.gate_up_proj:0/2",
                  norm="post_attention_layernorm")  # fmt: skip
    return (StackSlot("decoder", "", "layers", (own,), ffn, PromptSlot()),)


def modernbert() -> tuple[StackSlot, ...]:
    """As Phi-3's, in an encoder; local layers hand the attention their own mask."""
    own = AttentionSlot("encoder", "attn", *(f"attn.Wqkv:{x}" for x in "qkv"), "attn.Wo")
    ffn = FFNSlot("mlp", "mlp.Wi:1/2", "mlp.Wo", "mlp.act", "hidden_activation",
                  gate_proj="mlp.Wi:0/2", activation_dropout="mlp.drop",
                  norm="mlp_norm")  # fmt: skip
    return _encoder("layers", "", own, ffn, prompt=PromptSlot(strip="final_norm"))


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(norm: str = "post_attention_layernorm", activation: str = "hidden_act") -> tuple:
    """Llama, Mistral, Qwen, Gemma."""
    ffn = FFNSlot(
        "mlp", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", activation,
        gate_proj="mlp.gate_proj", norm=norm,
    )  # fmt: skip
    own = (attention("decoder", "self_attn", LLAMA),)
    return (StackSlot("decoder", "", "layers", own, ffn, PromptSlot()),)


def mixtral() -> tuple[StackSlot, ...]:
    """The experts hold their weights in one tensor and are called by the router."""
    own = (attention("decoder", "self_attn", LLAMA),)
    why = "its blocks are experts that a router chooses: put the method on the attention"
    return (StackSlot("decoder", "", "layers", own, None, PromptSlot(), no_ffn=why),)


def t5(gated: bool) -> tuple[StackSlot, ...]:
    """T5 and mT5; the block's output dropout is the layer's."""

    def ffn(index: int) -> FFNSlot:
        block = f"layer.{index}.DenseReluDense"
        gate, into = (f"{block}.wi_0", f"{block}.wi_1") if gated else (None, f"{block}.wi")
        return FFNSlot(
            block, into, f"{block}.wo", f"{block}.act", "dense_act_fn", gate_proj=gate,
            activation_dropout=f"{block}.dropout", norm=f"layer.{index}.layer_norm",
        )  # fmt: skip

    own = "layer.0.SelfAttention"
    encoder = (attention("encoder", own, tuple("qkvo")),)
    decoder = (
        attention("decoder", own, tuple("qkvo")),
        attention("cross", "layer.1.EncDecAttention", tuple("qkvo")),
    )
    return (
        StackSlot("encoder", "encoder", "encoder.block", encoder, ffn(1), PromptSlot()),
        StackSlot("decoder", "decoder", "decoder.block", decoder, ffn(2)),
    )


ROWS: list[SlotMap] = [
    SlotMap("bart", bart(norm_after="final_layer_norm")),
    SlotMap("bert", bert()),
    SlotMap("deberta-v2", deberta_v2()),
    SlotMap("electra", bert()),
    SlotMap("gemma2", llama("pre_feedforward_layernorm", "hidden_activation")),
    SlotMap("gemma3_text", llama("pre_feedforward_layernorm", "hidden_activation")),
    SlotMap("gpt2", gpt2()),
    SlotMap("llama", llama()),
    SlotMap("mbart", bart(norm="final_layer_norm", adapter_reads="residual")),
    SlotMap("mistral", llama()),
    SlotMap("mixtral", mixtral()),
    SlotMap("modernbert", modernbert()),
    SlotMap("mt5", t5(gated=True)),
    SlotMap("opt", opt()),
    SlotMap("phi3", phi3()),
    SlotMap("qwen2", llama()),
    SlotMap("qwen3", llama()),
    SlotMap("roberta", bert()),
    SlotMap("t5", t5(gated=False)),
    SlotMap("t5", t5(gated=True)),
    SlotMap("vit", vit()),
    SlotMap("whisper", bart(PromptSlot(layer="encoder.layers.0"), norm="final_layer_norm")),
    SlotMap("xlm-roberta", bert()),
]


def rows_of(model: nn.Module) -> list[SlotMap]:
    """The rows for the model's architecture."""
    return [row for row in ROWS if row.model_type == model.config.model_type]
