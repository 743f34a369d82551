"""LoRA by name is PEFT's: endings, regular expressions, all linear layers, patterns; and which
layers and words it names."""

import copy

import peft
import pytest
import torch

import pelt_fast
from pelt_fast import Modification, PeltConfig, lora
from pelt_fast.config.named_modules import targets_of
from pelt_fast.words import changed, parsed
from tests.models.by_name import MAKERS, Own, assert_same, loss_of, sites_of
from tests.models.test_parity import assert_close
from tests.small import bert, gradients, inputs, llama, t5


def twins(maker, targets, **words):
    """A model of ours and of PEFT with the same LoRA."""
    torch.manual_seed(1)
    base = MAKERS[maker]()
    model = pelt_fast.inject(copy.deepcopy(base), lora(4, 6, targets=targets, dropout=0, **words))
    names = words.get("patterns") or {}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, bias="none",
        layers_to_transform=list(words["layers"]) if "layers" in words else None,
        rank_pattern={name: value["r"] for name, value in names.items() if "r" in value},
        alpha_pattern={name: value["alpha"] for name, value in names.items() if "alpha" in value},
        task_type="SEQ_CLS" if maker == "bert" else None,
        modules_to_save=["classifier"] if maker == "bert" else None,
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config)
    for layer in theirs.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            with torch.no_grad():
                layer.lora_B["default"].weight.normal_(std=0.2)
    return model, theirs


def assert_parity(model, theirs):
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    sites = sites_of(model)
    assert sites.keys() == layers.keys()
    for name, layer in layers.items():
        with torch.no_grad():
            sites[name].lora_a.copy_(layer.lora_A["default"].weight)
            sites[name].lora_b.copy_(layer.lora_B["default"].weight)
        assert sites[name].scale == layer.scaling["default"]
    (out, loss), (wanted, their_loss) = loss_of(model.train()), loss_of(theirs.train())
    loss.backward()
    their_loss.backward()
    assert_same(out, wanted)
    ours, expected = {}, {}
    for name, layer in layers.items():
        ours[f"{name}.a"], ours[f"{name}.b"] = sites[name].lora_a.grad, sites[name].lora_b.grad
        expected[f"{name}.a"] = layer.lora_A["default"].weight.grad
        expected[f"{name}.b"] = layer.lora_B["default"].weight.grad
    assert_close(ours, expected)


CASES = [
    ("llama", "all-linear", {}),
    ("llama", ["q_proj", "v_proj"], {}),
    ("llama", r".*\.1\..*(up|down)_proj", {}),
    ("llama", ["self_attn.q_proj", "down_proj"], {"layers": [1]}),
    ("llama", "all-linear", {"patterns": {"layers.0.*.q_proj": dict(r=7, alpha=3),
                                          "down_proj": dict(r=2), "k_proj": dict(alpha=9)}}),
    ("neox", "all-linear", {}),
    ("neox", ["query_key_value", "dense"], {}),
    ("own", ["up", "gate", "down"], {}),
    ("own", r"blocks\.[02]\.(up|down)|head", {"patterns": {r"blocks\.0\.up": dict(r=3)}}),
    ("gpt2", ["c_attn", "mlp.c_fc"], {}),
    ("bert", "all-linear", {}),
]  # fmt: skip


@pytest.mark.parametrize("maker, targets, words", CASES, ids=[f"{m}-{t}" for m, t, _ in CASES])
def test_it_is_peft_s_lora(maker, targets, words):
    model, theirs = twins(maker, targets, **words)
    assert_parity(model, theirs)
    assert pelt_fast.explain(model).fallbacks == []


def test_all_linear_is_all_but_the_output_and_what_is_never_called(caplog):
    model = pelt_fast.inject(llama(), "lora", targets="all-linear", r=2)
    assert len(sites_of(model)) == 14 and "lm_head" not in sites_of(model)
    own = pelt_fast.inject(Own(), "lora", targets="ALL-linear", r=2)
    kinds = ("up", "gate", "down")
    expected = {f"blocks.{i}.{kind}" for i in range(3) for kind in kinds} | {"head"}
    assert sites_of(own).keys() == expected
    assert "no LoRA on mixer.out_proj: the MultiheadAttention around it" in caplog.text
    bert_sites = sites_of(pelt_fast.inject(bert(), "lora", targets="all-linear", r=2))
    assert "classifier" not in bert_sites and "bert.pooler.dense" in bert_sites


def test_names_and_the_paper_s_places_stand_together():
    method = lora(2, targets=["lm_head"]) + lora(3, targets="q,v") + pelt_fast.prefix(2)
    model = pelt_fast.inject(llama(), method)
    assert len([site for site in model._pelt.sites if site.op == "lora"]) == 5
    # a pattern is for the paper's places, too
    model = pelt_fast.inject(llama(), lora(2, targets="q,v", patterns={"0.*q_proj": dict(r=6)}))
    assert [m.lora_a.shape[0] for m in sites_of(model).values()] == [6, 2, 2, 2]


def test_t5_s_own_names():
    """In T5 q and v are names of modules as well: the paper's places."""
    places = pelt_fast.inject(t5(), "lora", r=2, targets=["q", "v"])
    names = pelt_fast.inject(t5(), "lora", r=2, targets=r".*\.(q|v)")
    assert {f"{n}" for n in sites_of(places)} == {f"{n}" for n in sites_of(names)}
    batch = inputs(names)
    names(**batch).loss.backward()
    assert len(gradients(names)) == 2 * len(sites_of(names))


def test_a_text_says_what_it_names():
    assert [t["target"] for t in targets_of("q, ffn.in")] == ["attention.q", "ffn.in"]
    assert targets_of(["q", "attention.q"]) == [dict(target="attention.q", modules=None)]
    for given, modules in (
        ("All-Linear", "all-linear"), ("q_proj,v_proj", ("q_proj", "v_proj")),
        (["query"], ("query",)), (["q", "wi"], ("q", "wi")), (r".*q_proj", r".*q_proj"),
    ):  # fmt: skip
        assert targets_of(given) == [dict(target="modules", modules=modules)]
    m = Modification("low_rank", "modules", size=2)
    assert m.modules == "all-linear"
    config = lora(targets=["a", "b"], patterns={"a": dict(r=3)}, layers=[2, 1])
    assert PeltConfig.from_json(config.to_json()) == config
    assert "modules" not in lora().to_json() and "patterns" not in lora().to_json()


def test_words_say_names_and_patterns():
    preset = pelt_fast.methods()["lora"]
    words = parsed(["targets=q_proj,v_proj", 'patterns={"q_proj": {"r": 4}}', "r=2", "alpha=8"])
    found = changed(preset, words).modifications
    assert (
        found == lora(2, 8, targets="q_proj,v_proj", patterns={"q_proj": dict(r=4)}).modifications
    )
    assert found[0].patterns == (("q_proj", 4, 2.0),)
    assert changed(preset, dict(targets="all-linear")).modifications[0].modules == "all-linear"
    places = changed(changed(preset, dict(targets=["x"])), dict(targets="q,v"))
    assert places.modifications == preset.modifications
    with pytest.raises(ValueError, match="patterns must be JSON"):
        parsed(["patterns=q_proj"])
