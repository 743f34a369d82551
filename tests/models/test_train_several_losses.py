"""The loss of a method's rows is the one that the model gives for these rows alone."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    BartForCausalLM,
    BartForSequenceClassification,
    RobertaForCausalLM,
)

from pelt_fast.integrations.several.losses import loss_of, losses_of, without_labels
from tests.small import MODELS, MORE, inputs

COUNTS = [2, 1, 4]


def of_config(kind, architecture: str, **changes) -> nn.Module:
    config = MODELS[architecture]().config
    config.update(changes)
    return (kind.from_config if hasattr(kind, "from_config") else kind)(config)


def batch_of(model: nn.Module, labels: str) -> dict:
    batch = inputs(model, batch=sum(COUNTS), padding="right")
    rows, count = sum(COUNTS), model.config.num_labels
    if labels == "tokens":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    elif labels == "classes of tokens":
        batch["labels"] = batch["input_ids"] % count
    elif labels == "class":
        batch["labels"] = torch.arange(rows) % count
    elif labels == "classes":
        batch["labels"] = (torch.rand(rows, count) > 0.5).float()
    else:
        batch["labels"] = torch.rand(rows) if count == 1 else torch.rand(rows, count)
    return batch


CASES = {
    "bart": (lambda: MODELS["bart"](), "tokens"),
    "t5": (lambda: MORE["t5"](), "tokens"),
    "llama": (lambda: MODELS["llama"](), "tokens"),
    "gpt2": (lambda: MORE["gpt2"](), "tokens"),
    "opt": (lambda: MORE["opt"](), "tokens"),
    "bart decoder, labels not shifted": (
        lambda: of_config(BartForCausalLM, "bart", is_encoder_decoder=False), "tokens"),
    "roberta decoder": (lambda: of_config(RobertaForCausalLM, "roberta", is_decoder=True), "tokens"),
    "masked": (lambda: of_config(AutoModelForMaskedLM, "roberta"), "tokens"),
    "token classes": (
        lambda: of_config(AutoModelForTokenClassification, "roberta"), "classes of tokens"),
    "class": (lambda: MODELS["roberta"](), "class"),
    "several classes": (lambda: MODELS["roberta"](), "classes"),
    "number": (lambda: MODELS["bert"](num_labels=1), "number"),
    "numbers": (lambda: MODELS["bert"](num_labels=2, problem_type="regression"), "numbers"),
    "class of bart": (
        lambda: of_config(BartForSequenceClassification, "bart", eos_token_id=2), "class"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_part_has_the_loss_that_it_has_alone(case, dtype):
    make, labels = CASES[case]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    batch = batch_of(model, labels)
    if case == "class of bart":
        batch["input_ids"][:, 0] = 2  # as many ends of the text in each row
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        loss = loss_of(model, batch, model.config)
        outputs = model(**without_labels(model, batch))
        found = losses_of(loss, outputs.logits, batch["labels"], COUNTS, model.config)
        parts = zip(*(value.split(COUNTS) for value in batch.values()))
        for ours, part in zip(found, parts, strict=True):
            own = model(**dict(zip(batch, part))).loss
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # other products of matrices
            torch.testing.assert_close(ours.float(), own.float(), rtol=tolerance, atol=tolerance)
    assert getattr(outputs, "loss", None) is None


def test_a_loss_of_another_kind_is_refused():
    class Other(type(MODELS["roberta"]())):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.loss = 2 * found.loss if found.loss is not None else None
            return found

    torch.manual_seed(0)
    model = Other(MODELS["roberta"]().config)
    batch = batch_of(model, "class")
    with pytest.raises(ValueError, match="the loss of Other is not known here"):
        loss_of(model, batch, model.config)
    del batch["labels"]
    with pytest.raises(ValueError, match="data_collator must give labels"):
        loss_of(model, batch, model.config)
