"""Small random models of the architectures: two layers, 32 wide, a vocabulary of 61.

Each function makes one model on the CPU. ``dropout`` sets every dropout of its config; further
keyword arguments change fields of the config.
"""

import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 61
PAD = 1


def bart(kind=BartForConditionalGeneration, dropout=0.1, config_class=BartConfig, **changes):
    config = dict(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=64, dropout=dropout,
        attention_dropout=dropout, activation_dropout=dropout, pad_token_id=PAD,
    )  # fmt: skip
    return kind(config_class(**(config | changes)))


def mbart(kind=MBartForConditionalGeneration, dropout=0.1, **changes):
    return bart(kind, dropout, MBartConfig, **changes)


def _encoder(config_class, kind, dropout, **changes):
    config = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, pad_token_id=PAD, num_labels=3,
    )  # fmt: skip
    return kind(config_class(**(config | changes)))


def roberta(kind=RobertaForSequenceClassification, dropout=0.1, **changes):
    return _encoder(RobertaConfig, kind, dropout, **changes)


def bert(kind=BertForSequenceClassification, dropout=0.1, **changes):
    return _encoder(BertConfig, kind, dropout, **changes)


def llama(kind=LlamaForCausalLM, dropout=0.0, **changes):
    config = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64,
        attention_dropout=dropout, pad_token_id=PAD,
    )  # fmt: skip
    return kind(LlamaConfig(**(config | changes)))


def t5(kind=T5ForConditionalGeneration, dropout=0.1, **changes):
    config = dict(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        dropout_rate=dropout, pad_token_id=PAD, decoder_start_token_id=0,
    )  # fmt: skip
    return kind(T5Config(**(config | changes)))


def causal(name: str, **own):
    """A maker of small models of transformers' ``name``, laid out like Llama."""

    def make(dropout=0.0, **changes):
        config = dict(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=64,
            attention_dropout=dropout, pad_token_id=PAD,
        )  # fmt: skip
        config_class = getattr(transformers, own.get("config", f"{name}Config"))
        fields = {key: value for key, value in own.items() if key != "config"}
        model_class = getattr(transformers, f"{name}ForCausalLM")
        return model_class(config_class(**(config | fields | changes)))

    return make


def gpt2(dropout=0.1, **changes):
    config = dict(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, pad_token_id=PAD,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(config | changes)))


def modernbert(dropout=0.1, **changes):
    config = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, attention_dropout=dropout,
        mlp_dropout=dropout, embedding_dropout=dropout, pad_token_id=PAD, num_labels=3,
        local_attention=6, global_attn_every_n_layers=2, bos_token_id=2, eos_token_id=3,
        cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    kind = transformers.ModernBertForSequenceClassification
    return kind(transformers.ModernBertConfig(**(config | changes)))


def opt(dropout=0.1, **changes):
    config = dict(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=48, max_position_embeddings=64, dropout=dropout, attention_dropout=dropout,
        pad_token_id=PAD, word_embed_proj_dim=32,
    )  # fmt: skip
    return transformers.OPTForCausalLM(transformers.OPTConfig(**(config | changes)))


def electra(dropout=0.1, **changes):
    kind, config = transformers.ElectraForSequenceClassification, transformers.ElectraConfig
    return _encoder(config, kind, dropout, embedding_size=24, **changes)


def deberta_v2(dropout=0.1, **changes):
    kind, config = transformers.DebertaV2ForSequenceClassification, transformers.DebertaV2Config
    settings = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8)
    return _encoder(config, kind, dropout, **(settings | changes))


def xlm_roberta(dropout=0.1, **changes):
    kind, config = transformers.XLMRobertaForSequenceClassification, transformers.XLMRobertaConfig
    return _encoder(config, kind, dropout, **changes)


def vit(dropout=0.1, **changes):
    config = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=12, patch_size=4, hidden_dropout_prob=dropout, num_labels=3,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return transformers.ViTForImageClassification(transformers.ViTConfig(**(config | changes)))


def whisper(dropout=0.1, **changes):
    config = dict(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, num_mel_bins=6, max_source_positions=10, max_target_positions=40,
        dropout=dropout, attention_dropout=dropout, activation_dropout=dropout, pad_token_id=PAD,
        bos_token_id=2, eos_token_id=3, decoder_start_token_id=2, begin_suppress_tokens=None,
        suppress_tokens=None,
    )  # fmt: skip
    kind = transformers.WhisperForConditionalGeneration
    return kind(transformers.WhisperConfig(**(config | changes)))


def t5_gated(dropout=0.1, **changes):
    return t5(dropout=dropout, feed_forward_proj="gated-gelu", **changes)


def mt5(dropout=0.1, **changes):
    config = dict(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        dropout_rate=dropout, pad_token_id=PAD, decoder_start_token_id=0,
    )  # fmt: skip
    kind = transformers.MT5ForConditionalGeneration
    return kind(transformers.MT5Config(**(config | changes)))


# Architectures of the parity suite alone. The other tests use MODELS as well.
MORE = {
    "deberta-v2": deberta_v2,
    "electra": electra,
    "gemma2": causal("Gemma2", query_pre_attn_scalar=8, sliding_window=4),
    "gemma2, no softcap": causal("Gemma2", query_pre_attn_scalar=8, sliding_window=4,
                                 attn_logit_softcapping=None),
    "gemma3_text": causal("Gemma3", config="Gemma3TextConfig", query_pre_attn_scalar=8,
                          sliding_window=4),
    "gpt2": gpt2,
    "mistral": causal("Mistral", sliding_window=4),
    "mixtral": causal("Mixtral", num_local_experts=4, num_experts_per_tok=2,
                      experts_implementation="eager"),
    "modernbert": modernbert,
    "mt5": mt5,
    "opt": opt,
    "phi3": causal("Phi3", resid_pdrop=0.0, embd_pdrop=0.0, bos_token_id=2, eos_token_id=3),
    "qwen2": causal("Qwen2"),
    "qwen3": causal("Qwen3"),
    "t5": t5,
    "t5, gated": t5_gated,
    "vit": vit,
    "whisper": whisper,
    "xlm-roberta": xlm_roberta,
}  # fmt: skip
MODELS = {"bart": bart, "mbart": mbart, "roberta": roberta, "bert": bert, "llama": llama}
