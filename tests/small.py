"""Inputs for the small models of ``pelt_fast.testing.models``, and the models by the same name."""

import torch

from pelt_fast.testing.models import (  # noqa: F401  (tests import the models from here)
    MODELS,
    MORE,
    PAD,
    VOCABULARY,
    bart,
    bert,
    causal,
    deberta_v2,
    electra,
    gpt2,
    llama,
    mbart,
    modernbert,
    mt5,
    opt,
    roberta,
    t5,
    t5_gated,
    vit,
    whisper,
    xlm_roberta,
)

# a method that a model has nothing for: Llama has no biases
MEANINGLESS = {("llama", "bitfit")}


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
    kind = model.config.model_type
    if kind == "vit":
        pixels = torch.randn(batch, 3, model.config.image_size, model.config.image_size)
        return dict(pixel_values=pixels, labels=torch.randint(0, 3, (batch,)))
    if kind == "whisper":
        frames = 2 * model.config.max_source_positions
        audio = torch.randn(batch, model.config.num_mel_bins, frames)
        return dict(input_features=audio, decoder_input_ids=found["input_ids"],
                    labels=found["input_ids"])  # fmt: skip
    if "SequenceClassification" in type(model).__name__:
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


def outputs_and_gradients(model, batch):
    """Logits and gradients, from one seed."""
    model.zero_grad()
    torch.manual_seed(3)
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), gradients(model)
