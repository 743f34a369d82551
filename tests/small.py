"""Small random models of the architectures, and inputs for them."""

import torch
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

# a method that a model has nothing for: Llama has no biases
MEANINGLESS = {("llama", "bitfit")}

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


MODELS = {"bart": bart, "mbart": mbart, "roberta": roberta, "bert": bert, "llama": llama}


def pairs(methods) -> list[tuple[str, str]]:
    """(architecture, method) of every pair that has meaning."""
    return [(a, m) for a in MODELS for m in methods if (a, m) not in MEANINGLESS]


def inputs(model, batch=3, length=9, padding=None) -> dict:
    """Token ids, labels and, with ``padding`` "left" or "right", a mask over ragged rows."""
    ids = torch.randint(4, VOCABULARY, (batch, length))
    found = dict(input_ids=ids)
    if padding is not None:
        mask = torch.ones_like(ids)
        for row in range(batch):
            hidden = slice(0, row) if padding == "left" else slice(length - row, length)
            mask[row, hidden] = 0
        found |= dict(input_ids=ids.masked_fill(mask == 0, PAD), attention_mask=mask)
    if model.config.model_type in ("bert", "roberta"):
        found["labels"] = torch.randint(0, 3, (batch,))
    else:
        found["labels"] = ids
    return found


def randomise(model, scale=0.2):
    """Give every trainable tensor a value of its own, so that zero inits hide nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def gradients(model) -> dict:
    """Gradients by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
