"""The architecture table. A new architecture is a new row; similar ones share a function.

An architecture with variants (T5's plain and gated blocks) has a row for each.
"""

from torch import nn

from .layout import AttentionLayout, FFNLayout, Layout, PromptLayout, StackLayout


def attention(kind: str, module: str, names: tuple[str, str, str, str]) -> AttentionLayout:
    """An attention whose projections are ``names`` of ``module``: q, k, v, out."""
    return AttentionLayout(kind, module, *(f"{module}.{name}" for name in names))


def _encoder(
    layers: str, owner: str, self_attention: AttentionLayout, ffn: FFNLayout | None, **more
) -> tuple:
    return (StackLayout("encoder", owner, layers, (self_attention,), ffn, **more),)


def bert() -> tuple[StackLayout, ...]:
    """BERT, RoBERTa, ELECTRA."""
    self_attention = AttentionLayout(
        "encoder", "attention.self", "attention.self.query", "attention.self.key",
        "attention.self.value", "attention.output.dense",
    )  # fmt: skip
    prompt = PromptLayout(norm="embeddings.LayerNorm", strip="encoder")
    return _encoder("encoder.layer", "encoder", self_attention, _bert_ffn(), prompt=prompt)


def _bert_ffn() -> FFNLayout:
    return FFNLayout(
        "intermediate.dense", "intermediate.dense", "output.dense",
        "intermediate.intermediate_act_fn", "hidden_act", output_dropout="output.dropout",
        norm_after="output.LayerNorm",
    )  # fmt: skip


def deberta_v2() -> tuple[StackLayout, ...]:
    """Its attention does not use the attention interface, so that it cannot carry a prefix."""
    self_attention = AttentionLayout(
        "encoder", "attention.self", "attention.self.query_proj", "attention.self.key_proj",
        "attention.self.value_proj", "attention.output.dense",
    )  # fmt: skip
    prompt = PromptLayout(norm="embeddings.LayerNorm", strip="encoder", own_mask=True)
    return _encoder("encoder.layer", "encoder", self_attention, _bert_ffn(), prompt=prompt)


def vit() -> tuple[StackLayout, ...]:
    """The block's output dropout is the layer's, which drops an adapter's update as well."""
    self_attention = attention("encoder", "attention", ("q_proj", "k_proj", "v_proj", "o_proj"))
    ffn = FFNLayout("mlp", "mlp.fc1", "mlp.fc2", "mlp.activation_fn", "hidden_act",
                    norm="layernorm_after")  # fmt: skip
    prompt = PromptLayout(layer="layers.0", strip="layernorm")
    return _encoder("layers", "", self_attention, ffn, prompt=prompt)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def _bart_ffn(
    *attentions: str, activation_dropout: str | None = "activation_dropout", **norms: str
) -> FFNLayout:
    return FFNLayout(
        "fc1", "fc1", "fc2", "activation_fn", "activation_function",
        activation_dropout=activation_dropout, output_dropout="dropout",
        output_dropout_also=attentions, **norms,
    )  # fmt: skip


_BART_PROMPT = PromptLayout(positions="encoder.embed_positions")


def bart(prompt: PromptLayout = _BART_PROMPT, **norms: str) -> tuple[StackLayout, ...]:
    """BART, mBART, Whisper."""
    self_attn, cross_attn = "self_attn", "encoder_attn"
    ffns = _bart_ffn(self_attn, **norms), _bart_ffn(self_attn, cross_attn, **norms)
    encoder = (attention("encoder", self_attn, PROJECTIONS),)
    decoder = (
        attention("decoder", self_attn, PROJECTIONS),
        attention("cross", cross_attn, PROJECTIONS),
    )
    return (
        StackLayout("encoder", "encoder", "encoder.layers", encoder, ffns[0], prompt),
        StackLayout("decoder", "decoder", "decoder.layers", decoder, ffns[1]),
    )


def opt() -> tuple[StackLayout, ...]:
    """BART's layer in a decoder alone."""
    ffn = _bart_ffn("self_attn", activation_dropout=None, norm="final_layer_norm")
    attentions = (attention("decoder", "self_attn", PROJECTIONS),)
    prompt = PromptLayout(positions="decoder.embed_positions")
    return (StackLayout("decoder", "decoder", "decoder.layers", attentions, ffn, prompt),)


def gpt2() -> tuple[StackLayout, ...]:
    """Every projection is a Conv1D, whose weight is stored transposed."""
    self_attention = AttentionLayout(
        "decoder", "attn", "attn.c_attn:q", "attn.c_attn:k", "attn.c_attn:v", "attn.c_proj:"
    )
    ffn = FFNLayout("mlp", "mlp.c_fc:", "mlp.c_proj:", "mlp.act", "activation_function",
                    output_dropout="mlp.dropout", norm="ln_2")  # fmt: skip
    return (StackLayout("decoder", "", "h", (self_attention,), ffn, PromptLayout(positions="wpe")),)


def phi3() -> tuple[StackLayout, ...]:
    """q, k and v are rows of one matrix, gate and up of another."""
    joined = "self_attn.qkv_proj"
    self_attention = AttentionLayout(
        "decoder", "self_attn", *(f"{joined}:{x}" for x in "qkv"), "self_attn.o_proj"
    )
    ffn = FFNLayout("mlp", "mlp.gate_up_proj:1/2", "mlp.down_proj", "mlp.activation_fn",
                    "hidden_act", gate_proj="mlp.gate_up_proj:0/2",
                    norm="post_attention_layernorm")  # fmt: skip
    return (StackLayout("decoder", "", "layers", (self_attention,), ffn, PromptLayout()),)


def modernbert() -> tuple[StackLayout, ...]:
    """Joined matrices as in Phi-3, in an encoder; local layers have another attention mask."""
    self_attention = AttentionLayout(
        "encoder", "attn", *(f"attn.Wqkv:{x}" for x in "qkv"), "attn.Wo"
    )
    ffn = FFNLayout("mlp", "mlp.Wi:1/2", "mlp.Wo", "mlp.act", "hidden_activation",
                    gate_proj="mlp.Wi:0/2", activation_dropout="mlp.drop",
                    norm="mlp_norm")  # fmt: skip
    return _encoder("layers", "", self_attention, ffn, prompt=PromptLayout(strip="final_norm"))


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama(norm: str = "post_attention_layernorm", activation: str = "hidden_act") -> tuple:
    """Llama, Mistral, Qwen, Gemma."""
    ffn = FFNLayout(
        "mlp", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", activation,
        gate_proj="mlp.gate_proj", norm=norm,
    )  # fmt: skip
    attentions = (attention("decoder", "self_attn", LLAMA),)
    return (StackLayout("decoder", "", "layers", attentions, ffn, PromptLayout()),)


def mixtral() -> tuple[StackLayout, ...]:
    """The experts hold their weights in one tensor and are called by the router."""
    attentions = (attention("decoder", "self_attn", LLAMA),)
    why = "its blocks are experts that a router chooses: put the method on the attention"
    return (StackLayout("decoder", "", "layers", attentions, None, PromptLayout(), no_ffn=why),)


def t5(gated: bool) -> tuple[StackLayout, ...]:
    """T5 and mT5; the block's output dropout is the layer's."""

    def ffn(index: int) -> FFNLayout:
        block = f"layer.{index}.DenseReluDense"
        gate, into = (f"{block}.wi_0", f"{block}.wi_1") if gated else (None, f"{block}.wi")
        return FFNLayout(
            block, into, f"{block}.wo", f"{block}.act", "dense_act_fn", gate_proj=gate,
            activation_dropout=f"{block}.dropout", norm=f"layer.{index}.layer_norm",
        )  # fmt: skip

    self_attn = "layer.0.SelfAttention"
    encoder = (attention("encoder", self_attn, tuple("qkvo")),)
    decoder = (
        attention("decoder", self_attn, tuple("qkvo")),
        attention("cross", "layer.1.EncDecAttention", tuple("qkvo")),
    )
    return (
        StackLayout("encoder", "encoder", "encoder.block", encoder, ffn(1), PromptLayout()),
        StackLayout("decoder", "decoder", "decoder.block", decoder, ffn(2)),
    )


# built as BERT is, embeddings and prompts as well (tests/models/test_discovery.py)
_LIKE_BERT = (
    "bert-generation", "camembert", "data2vec-text", "ernie", "luke", "roc_bert", "splinter",
    "tapas",
)  # fmt: skip

ROWS: list[Layout] = [
    *(Layout(name, bert()) for name in _LIKE_BERT),
    Layout("bart", bart(norm_after="final_layer_norm")),
    Layout("bert", bert()),
    Layout("deberta-v2", deberta_v2()),
    Layout("electra", bert()),
    Layout("gemma2", llama("pre_feedforward_layernorm", "hidden_activation")),
    Layout("gemma3_text", llama("pre_feedforward_layernorm", "hidden_activation")),
    Layout("gpt2", gpt2()),
    Layout("llama", llama()),
    Layout("mbart", bart(norm="final_layer_norm", adapter_reads="residual")),
    Layout("mistral", llama()),
    Layout("mixtral", mixtral()),
    Layout("modernbert", modernbert()),
    Layout("mt5", t5(gated=True)),
    Layout("opt", opt()),
    Layout("phi3", phi3()),
    Layout("qwen2", llama()),
    Layout("qwen3", llama()),
    Layout("roberta", bert()),
    Layout("t5", t5(gated=False)),
    Layout("t5", t5(gated=True)),
    Layout("vit", vit()),
    Layout("whisper", bart(PromptLayout(layer="encoder.layers.0"), norm="final_layer_norm")),
    Layout("xlm-roberta", bert()),
]


def rows_of(model: nn.Module) -> list[Layout]:
    """The rows for the model's architecture."""
    return [row for row in ROWS if row.model_type == model.config.model_type]
