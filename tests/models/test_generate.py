"""Decoding: greedy tokens are the same with and without a cache, of any kind."""

import pytest
import torch

import pelt_fast
from tests.models.test_parity import injected, small_method
from tests.small import MODELS, PAD, inputs, randomise

NEW = 8


def tokens(model, batch, **options):
    kept = {name: value for name, value in batch.items() if name != "labels"}
    return model.generate(**kept, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                          pad_token_id=PAD, **options)  # fmt: skip


METHODS = [
    "lora", "houlsby", "pfeiffer", "prefix", "prefix_ungated", "parallel_attn_parallel_ffn",
    "multi_head_parallel_adapter", "mam",
]  # fmt: skip


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_greedy_with_and_without_cache_gives_the_same_tokens(architecture, method, padding, choice):
    model = MODELS[architecture](dropout=0.1)
    model.set_attn_implementation(choice)
    model = randomise(pelt_fast.inject(model, small_method(method)), 0.3).eval()
    batch = inputs(model, padding=padding)
    without = tokens(model, batch, use_cache=False)
    assert torch.equal(tokens(model, batch, use_cache=True), without)
    if padding is None and architecture == "llama":
        assert torch.equal(tokens(model, batch, cache_implementation="static"), without)


def test_left_padding_changes_no_token():
    model = injected("llama", "mam", 0.0, scale=0.3).eval()
    ids = inputs(model, batch=1, length=5)["input_ids"]
    padded = torch.cat([torch.full((1, 4), PAD), ids], 1)
    mask = (torch.arange(9) >= 4).long()[None]
    plain = tokens(model, dict(input_ids=ids))[:, 5:]
    assert torch.equal(tokens(model, dict(input_ids=padded, attention_mask=mask))[:, 9:], plain)


def test_beam_search_runs_with_a_prefix():
    model = injected("bart", "mam", scale=0.3).eval()
    found = tokens(model, inputs(model), num_beams=3)
    assert found.shape[0] == 3
