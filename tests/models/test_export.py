"""LoRA written as PEFT keeps it, loaded by PEFT itself."""

import copy
import json

import pytest
import torch
from peft import PeftModel

import pelt_fast
from tests.models.judge import assert_near, exactly
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, randomise


@pytest.mark.parametrize("method", ["lora", "lora_ffn"])
@pytest.mark.parametrize("architecture", ["bart", "mbart", "roberta", "llama"])
def test_peft_loads_it_and_gives_our_outputs(architecture, method, tmp_path):
    torch.manual_seed(0)
    plain = MODELS[architecture](dropout=0.0).eval()
    ours = randomise(pelt_fast.inject(copy.deepcopy(plain), small_method(method))).eval()
    pelt_fast.export_peft(ours, tmp_path)
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    batch = inputs(ours, padding="right")
    exact = exactly(ours, batch)["logits"]
    with torch.no_grad():
        logits = ours(**batch).logits
        assert_near(theirs(**batch).logits, logits, exact)
        # and back: PEFT's model on our ops
        assert_near(pelt_fast.accelerate_peft(theirs)(**batch).logits, logits, exact)


def test_the_config_says_what_was_injected(tmp_path):
    model = pelt_fast.inject(MODELS["llama"](), small_method("lora", dropout=0.1))
    pelt_fast.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (5, 10, 0.1)
    assert config["task_type"] == "CAUSAL_LM" and config["modules_to_save"] is None
    assert config["target_modules"][0] == "model.layers.0.self_attn.q_proj"
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("build, message", [
    (lambda: pelt_fast.inject(MODELS["llama"](), small_method("mam")), "holds LoRA alone"),
    (lambda: pelt_fast.inject(MODELS["roberta"](), "bitfit"), "holds LoRA alone"),
    (lambda: pelt_fast.inject(MORE["phi3"](), small_method("lora")), "part of a fused projection"),
    (lambda: MODELS["llama"](), "nothing is injected"),
])  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_and_nothing_written(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pelt_fast.export_peft(build(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_several_ranks_are_refused(tmp_path):
    q, v = pelt_fast.methods()["lora"].modifications
    config = pelt_fast.PeltConfig("two", (
        pelt_fast.Modification(**{**q.__dict__, "size": 3}),
        pelt_fast.Modification(**{**v.__dict__, "size": 5}),
    ))  # fmt: skip
    with pytest.raises(ValueError, match="one rank, scale and dropout, this method has 2"):
        pelt_fast.export_peft(pelt_fast.inject(MODELS["llama"](), config), tmp_path)
