"""Rows are packed where the model keeps their sequences apart; where it does not they are padded."""

import logging

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

import pelt_fast
from tests.models.test_parity import small_method
from tests.models.test_trl import rows, tokenizer
from tests.models.test_trl_trainers import SETTINGS
from tests.small import MODELS, MORE, VOCABULARY, randomise

trl = pytest.importorskip("trl")
from pelt_fast.integrations.packed_rows import keeps_apart, why_not_packed
from pelt_fast.integrations.trl import PeltSFTTrainer


def injected(architecture: str, method: str = "lora"):
    torch.manual_seed(0)
    model = {**MODELS, **MORE}[architecture]()
    return randomise(pelt_fast.inject(model, small_method(method)))


@pytest.mark.parametrize("method", ["lora", "mam"])
@pytest.mark.parametrize("architecture, apart", [("llama", True), ("gpt2", True), ("opt", False)])
def test_a_model_is_tried_and_left_as_it_was(architecture, apart, method):
    model = injected(architecture, method).train()
    model.model.eval() if hasattr(model, "model") else model.transformer.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert keeps_apart(model) is apart
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_experts_that_round_otherwise_are_no_sequence_that_sees_another():
    torch.manual_seed(0)
    size = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=4, num_local_experts=8)  # fmt: skip
    assert keeps_apart(MixtralForCausalLM(MixtralConfig(**size)))


def test_a_prompt_says_why():
    assert "prompt tuning cannot take packed sequences" in why_not_packed(
        injected("llama", "prompt")
    )


def test_a_model_without_weights_is_not_packed():
    with torch.device("meta"):
        model = MODELS["llama"]()
    assert "cannot be tried on LlamaForCausalLM: weights are on the meta" in why_not_packed(model)


def trainer(model, folder, **changes):
    settings = trl.SFTConfig(output_dir=str(folder), **{**SETTINGS, "max_length": 16, **changes})
    return PeltSFTTrainer(
        model, settings, train_dataset=rows(), processing_class=tokenizer()
    ), settings


@pytest.mark.parametrize("changes", [dict(packing=True), dict(padding_free=True, max_length=None)])
@pytest.mark.parametrize("architecture, packs", [("llama", True), ("opt", False)])
def test_the_trainer_packs_or_pads_and_says_so(architecture, packs, changes, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "pelt_fast"):
        found, settings = trainer(injected(architecture), tmp_path, **changes)
    batch = next(iter(found.get_train_dataloader()))
    assert ("position_ids" in batch) is packs and ("attention_mask" in batch) is not packs
    assert ("the rows are padded, not packed" in caplog.text) is not packs
    assert getattr(settings, next(iter(changes)))  # the user's settings are not written to


def test_rows_that_are_joined_on_purpose_stay_so(tmp_path):
    found, _ = trainer(injected("opt"), tmp_path, packing=True, packing_strategy="wrapped")
    assert found.args.packing
