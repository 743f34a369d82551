"""PEFT's files: what we write PEFT loads, what PEFT saves we load, outputs the same."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import pelt_fast
from tests.models.judge import assert_near, exactly
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, randomise


def both_ways(ours, plain, folder):
    """PEFT loads what we wrote and we load it again, to our outputs: PEFT's model, our logits, the
    exact ones, the batch."""
    pelt_fast.export_peft(ours, folder)
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    again = pelt_fast.load_peft(copy.deepcopy(plain), folder).eval()
    batch = inputs(ours, padding="right")
    exact = exactly(ours, batch)["logits"]
    with torch.no_grad():
        logits = ours(**batch).logits
        assert_near(theirs(**batch).logits, logits, exact)
        assert_near(again(**batch).logits, logits, exact)
    return theirs, logits, exact, batch


@pytest.mark.parametrize("method", ["lora", "lora_ffn"])
@pytest.mark.parametrize("architecture", ["bart", "mbart", "roberta", "llama", "t5", "gpt2", "phi3",
                                          "modernbert"])  # fmt: skip
def test_peft_loads_it_and_gives_our_outputs(architecture, method, tmp_path):
    torch.manual_seed(0)
    plain = {**MODELS, **MORE}[architecture](dropout=0.0).eval()
    ours = randomise(pelt_fast.inject(copy.deepcopy(plain), small_method(method))).eval()
    theirs, logits, exact, batch = both_ways(ours, plain, tmp_path)
    with torch.no_grad():
        if architecture != "gpt2":  # and back: PEFT's model on our ops
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
    (lambda: pelt_fast.inject(MODELS["llama"](), small_method("prefix_ungated")), "is gated and on"),
    (lambda: pelt_fast.inject(MODELS["llama"](), small_method("prefix", layers=(1,))), "on layers"),
    (lambda: pelt_fast.inject(MODELS["llama"](), small_method("houlsby")), "holds LoRA alone"),
    (lambda: pelt_fast.inject(MODELS["llama"](), small_method("learned_scale_parallel_adapter")),
     "holds LoRA alone"),
    (lambda: MODELS["llama"](), "nothing is injected"),
])  # fmt: skip
def test_what_the_format_cannot_hold_is_refused_and_nothing_written(build, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pelt_fast.export_peft(build(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def two(**changes):
    """LoRA on q as small methods have it, on v with ``changes``."""
    q, v = small_method("lora").modifications
    return pelt_fast.PeltConfig("two", (q, dataclasses.replace(v, **changes)))


@pytest.mark.parametrize("changes", [
    dict(size=3), dict(scale=0.7), dict(size=3, scale=0.7), dict(layers=(1,)),
    dict(size=2, layers=(0,)),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "roberta", "gpt2"])
def test_ranks_scales_and_layers_stand_in_peft_s_patterns(architecture, changes, tmp_path):
    torch.manual_seed(0)
    plain = {**MODELS, **MORE}[architecture](dropout=0.0).eval()
    ours = randomise(pelt_fast.inject(copy.deepcopy(plain), two(**changes))).eval()
    both_ways(ours, plain, tmp_path)


def test_several_dropouts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one dropout, this method has 2"):
        pelt_fast.export_peft(pelt_fast.inject(MODELS["llama"](), two(dropout=0.3)), tmp_path)


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
