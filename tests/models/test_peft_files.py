"""PEFT's files: what we write PEFT loads, what PEFT saves we load, outputs the same."""

import copy
import json

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn

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
    (lambda: pelt_fast.inject(MODELS["roberta"](), small_method("prefix")), "is another function"),
    (lambda: pelt_fast.inject(MORE["opt"](), small_method("prefix")), "is another function"),
    (lambda: pelt_fast.inject(MORE["mistral"](), small_method("prefix")), "out of a window"),
    (lambda: pelt_fast.inject(MORE["gpt2"](), small_method("prompt")), "they are two functions"),
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


def front_of(model, batch, theirs):
    """PEFT returns the logits of its virtual tokens too."""
    with torch.no_grad():
        logits = theirs(**{name: t for name, t in batch.items() if name != "labels"}).logits
    return logits[:, logits.shape[1] - batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("method", ["prefix", "prefix_nomlp", "prompt"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_prefix_and_prompt_are_peft_s_there_and_back(architecture, method, padding, tmp_path):
    torch.manual_seed(0)
    window = {"sliding_window": None} if architecture == "mistral" else {}
    plain = {**MODELS, **MORE}[architecture](dropout=0.0, **window).eval()
    ours = randomise(pelt_fast.inject(copy.deepcopy(plain), small_method(method))).eval()
    batch = inputs(ours, padding=padding)
    exact = exactly(ours, batch)["logits"]
    seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    pelt_fast.export_peft(ours, tmp_path)
    with torch.no_grad():
        logits = ours(**batch).logits
        theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
        assert_near(front_of(ours, batch, theirs)[seen], logits[seen], exact[seen])
        again = pelt_fast.load_peft(copy.deepcopy(plain), tmp_path).eval()
        assert_near(again(**batch).logits[seen], logits[seen], exact[seen])


@pytest.mark.parametrize("architecture", ["llama", "roberta", "bart"])
@pytest.mark.parametrize("changes", [
    {},
    dict(use_rslora=True, lora_alpha=3),
    dict(rank_pattern={"0.*q_proj": 2, "0.*query": 2}, alpha_pattern={"v_proj": 7, "value": 7}),
], ids=["plain", "rank-stabilised", "patterns"])  # fmt: skip
def test_lora_that_peft_saved_gives_peft_s_outputs(architecture, changes, tmp_path):
    torch.manual_seed(0)
    plain = MODELS[architecture](dropout=0.0).eval()
    targets = ["query", "value"] if architecture == "roberta" else ["q_proj", "v_proj", "fc1"]
    theirs = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(
        r=5, target_modules=targets, lora_dropout=0.1,
        modules_to_save=["classifier"] if architecture == "roberta" else None, **changes,
    ))  # fmt: skip
    randomise(theirs).save_pretrained(tmp_path)
    ours = pelt_fast.load_peft(copy.deepcopy(plain), tmp_path).eval()
    batch = inputs(plain, padding="right")
    exact = exactly(ours, batch)["logits"]
    with torch.no_grad():
        assert_near(ours(**batch).logits, theirs.eval()(**batch).logits, exact)
    assert pelt_fast.count_parameters(ours).head > 0 or architecture != "roberta"


@pytest.mark.parametrize("changes, message", [
    (dict(use_dora=True), "is not plain LoRA: use_dora"),
    (dict(bias="all"), "is not plain LoRA: bias"),
    (dict(layers_to_transform=[1]), "but not on"),
    (dict(target_modules=["lm_head"]), "has no place for LoRA on lm_head"),
])  # fmt: skip
def test_what_is_no_method_here_is_refused_and_nothing_changed(changes, message, tmp_path):
    plain = MODELS["llama"]()
    config = peft.LoraConfig(**(dict(r=5, target_modules=["q_proj"]) | changes))
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        pelt_fast.load_peft(plain, tmp_path)
    assert all(p.requires_grad for p in plain.parameters())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        pelt_fast.load_peft(MODELS["llama"](), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        pelt_fast.load_peft(MODELS["llama"](), tmp_path)
    torch.save({"a": nn.Linear(2, 2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="or holds more than tensors"):
        pelt_fast.load_peft(MODELS["llama"](), tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds IA3: LORA, PREFIX_TUNING, PROMPT_TUNING"):
        pelt_fast.load_peft(MODELS["llama"](), tmp_path)
