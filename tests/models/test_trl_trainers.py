"""Our checkpoints in TRL's trainers: SFT and DPO write the method alone and leave the base."""

import math

import pytest
import torch
from datasets import Dataset

import pelt_fast
from pelt_fast.injection.count import is_method
from tests.models.test_parity import small_method
from tests.models.test_trl import rows, tokenizer
from tests.small import MODELS, randomise

trl = pytest.importorskip("trl")
from pelt_fast.integrations.trl import PeltDPOTrainer, PeltSFTTrainer

SETTINGS = dict(
    max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, report_to=[],
    save_steps=8, bf16=False, gradient_checkpointing=False, disable_tqdm=True, use_cpu=True,
)  # fmt: skip


def pairs() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": f"w{i} w{i} ", "chosen": "w5 w6 w7", "rejected": "w8 w9"}
            for i in range(10, 34)
        ]
    )


def trained(kind, settings, data, tmp_path, method, **more):
    torch.manual_seed(0)
    model = pelt_fast.inject(MODELS["llama"](), small_method(method, dropout=0.0))
    more = {name: make(model) for name, make in more.items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = settings(output_dir=str(tmp_path), **SETTINGS)
    trainer = kind(model, args=arguments, train_dataset=data, processing_class=tokenizer(), **more)
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_method(name), name
    written = {path.name for path in (tmp_path / "checkpoint-8").iterdir()}
    assert "pelt_model.safetensors" in written and "model.safetensors" not in written
    assert not list(tmp_path.rglob("README.md"))
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_sft_writes_the_method_alone(tmp_path):
    log = trained(PeltSFTTrainer, trl.SFTConfig, rows(), tmp_path, "lora")
    assert log[-1]["loss"] < log[0]["loss"]


def test_dpo_starts_at_its_reference_and_learns_what_is_chosen(tmp_path):
    def settings(**given):
        return trl.DPOConfig(precompute_ref_log_probs=True, **given)

    log = trained(PeltDPOTrainer, settings, pairs(), tmp_path, "lora")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["rewards/margins"] > 0.05


def test_dpo_beside_the_base_on_the_same_weights_is_the_same(tmp_path):
    def settings(**given):
        return trl.DPOConfig(precompute_ref_log_probs=True, **given)

    ahead = trained(PeltDPOTrainer, settings, pairs(), tmp_path / "ahead", "lora")
    beside = trained(PeltDPOTrainer, trl.DPOConfig, pairs(), tmp_path / "beside", "lora",
                     ref_model=pelt_fast.reference_model)  # fmt: skip
    found, wanted = ([entry["loss"] for entry in log] for log in (beside, ahead))
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind, settings, data", [
    (PeltSFTTrainer, trl.SFTConfig, rows), (PeltDPOTrainer, trl.DPOConfig, pairs),
])  # fmt: skip
def test_a_lora_that_trl_would_go_past_is_refused(kind, settings, data, tmp_path):
    model = MODELS["llama"]()
    pelt_fast.inject(model, "lora", targets=["lm_head"])
    arguments = settings(output_dir=str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match="a LoRA on it would not train"):
        kind(model, args=arguments, train_dataset=data(), processing_class=tokenizer())


@pytest.mark.parametrize("kind, settings, data", [
    (PeltSFTTrainer, trl.SFTConfig, rows), (PeltDPOTrainer, trl.DPOConfig, pairs),
])  # fmt: skip
def test_what_trains_beside_a_quantised_base_keeps_its_digits(kind, settings, data, tmp_path):
    """TRL casts what trains to bf16 where the model says that it is loaded in 4 bits."""
    torch.manual_seed(0)
    model = randomise(pelt_fast.inject(MODELS["llama"](), small_method("lora")))
    model.is_loaded_in_4bit = True
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in before.values())
    more = {} if kind is PeltSFTTrainer else dict(ref_model=pelt_fast.reference_model(model))
    arguments = settings(output_dir=str(tmp_path), **SETTINGS)
    kind(model, args=arguments, train_dataset=data(), processing_class=tokenizer(), **more)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == before.keys()
    for name, value in before.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
