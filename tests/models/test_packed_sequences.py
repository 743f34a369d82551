"""Padding-free batches: several sequences in one row, told apart by position_ids that start again.
Each is what it is alone, a prefix visible to each."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

import pelt_fast
from tests.models.judge import assert_near
from tests.models.test_parity import assert_close, small_method
from tests.small import MODELS, MORE, VOCABULARY, gradients, randomise

LENGTHS = (5, 7, 3)
METHODS = [name for name in pelt_fast.methods() if name not in ("full", "linear_probe", "prompt")]


def built(architecture: str, method: str):
    torch.manual_seed(0)
    model = {**MODELS, **MORE}[architecture](dropout=0.0)
    changes = {} if method == "bitfit" else dict(dropout=0.0)
    return randomise(pelt_fast.inject(model, small_method(method, **changes)))


def sequences() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(4, VOCABULARY, (1, length)) for length in LENGTHS]


def flattened() -> dict:
    """What transformers' collator makes of them."""
    rows = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()} for ids in sequences()]
    return dict(DataCollatorWithFlattening(return_tensors="pt")(rows))


@pytest.mark.parametrize("architecture, method", [
    *(("llama", method) for method in METHODS if method != "bitfit"),
    ("gpt2", "mam"), ("mistral", "mam"), ("gemma3_text", "prefix"), ("phi3", "lora"),
    ("qwen2", "bitfit"),
])  # fmt: skip
def test_a_sequence_in_a_row_of_several_is_what_it_is_alone(architecture, method):
    model = built(architecture, method).train()
    alone = [model(ids, use_cache=False).logits for ids in sequences()]
    with torch.no_grad():
        exact = [model.double()(ids, use_cache=False).logits for ids in sequences()]
    model.float()
    packed = model(**flattened(), use_cache=False)
    assert_near(packed.logits, torch.cat(alone, 1), torch.cat(exact, 1))
    packed.logits.square().mean().backward()
    found = gradients(model)
    model.zero_grad()
    torch.cat(
        [model(ids, use_cache=False).logits for ids in sequences()], 1
    ).square().mean().backward()
    assert_close(found, gradients(model), 1e-4)


def test_a_prompt_is_refused_rather_than_given_to_the_first_alone():
    model = built("llama", "prompt")
    with pytest.raises(ValueError, match="prompt tuning cannot take packed sequences"):
        model(**flattened(), use_cache=False)
    ids = sequences()[0]
    positions = torch.arange(ids.shape[1])[None]
    assert torch.equal(model(ids, position_ids=positions).logits, model(ids).logits)
