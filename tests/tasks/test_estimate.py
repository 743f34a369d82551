"""What the estimate of a causal language model's run counts."""

import pytest
import torch

import pelt_fast
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.estimate import QUANTISED_BYTES, estimate
from tests.small import llama


def model():
    with torch.device("meta"):
        return pelt_fast.inject(llama(num_hidden_layers=8), "lora", r=4)


def recipe(**changes) -> recipes.Recipe:
    base = recipes.load("instruct").replace(max_length=64, batch_size=64, eval_batch_size=1)
    return base.replace(**changes)


def test_checkpointing_keeps_less_and_a_smaller_batch_too():
    whole, light = (estimate(model(), recipe(gradient_checkpointing=g)) for g in (False, True))
    tokens, width, layers = 64 * 64, 32, 8
    assert whole.bytes - light.bytes == tokens * width * 2 * (16 * layers - 16 - layers)
    assert estimate(model(), recipe(batch_size=32)).bytes < whole.bytes


def test_a_cpu_keeps_the_wider_of_the_two():
    assert estimate(model(), recipe(), "cpu").bytes > estimate(model(), recipe(), "cuda").bytes


@pytest.mark.parametrize("quantize", QUANTISED_BYTES)
def test_quantised_weights_are_those_of_linear_layers_without_the_head(quantize):
    built = model()
    weights = [m.weight for m in built.model.layers.modules() if type(m) is torch.nn.Linear]
    saved = sum(w.numel() for w in weights) * (4 - QUANTISED_BYTES[quantize])
    whole, small = (estimate(built, recipe(quantize=q)).bytes for q in ("", quantize))
    assert whole - small == pytest.approx(saved, abs=2)


def test_an_evaluation_may_need_more_than_training():
    few = recipe(batch_size=1, gradient_checkpointing=True, max_length=32)
    most = few.replace(eval_batch_size=512)
    more = estimate(model(), most).bytes - estimate(model(), few).bytes
    assert more > 500 * 32 * 61  # rows x tokens x vocabulary, in bytes more than twice that


@pytest.mark.parametrize("precision, width", [("fp32", 4), ("bf16", 2 + 4)])
def test_an_evaluation_in_16_bits_has_its_logits_in_both_widths(precision, width):
    few = recipe(batch_size=1, gradient_checkpointing=True, max_length=32, precision=precision)
    found = [estimate(model(), few.replace(eval_batch_size=n), "cuda").bytes for n in (512, 1024)]
    assert found[1] - found[0] == 512 * 32 * model().config.vocab_size * width
