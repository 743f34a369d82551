"""LoRA by name that is saved, merged, copied, taken off, written by PEFT or named in a recipe."""

import copy

import peft
import pytest
import torch

import pelt_fast
from pelt_fast import lora
from pelt_fast.tasks import recipe as recipes
from tests.models.by_name import MAKERS, assert_same, loss_of, sites_of
from tests.small import bert, gradients, llama, randomise


@pytest.mark.parametrize("maker", ["llama", "neox", "own", "gpt2"])
def test_the_life_of_a_method_by_name(maker, tmp_path):
    torch.manual_seed(1)
    # frozen: torch's MultiheadAttention computes otherwise where it trains
    base = MAKERS[maker]().requires_grad_(False)
    method = lora(3, 6, targets=r".*(q_proj|dense|up|down|down_proj|c_fc|c_proj)", dropout=0.0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    plain, _ = loss_of(base.eval())
    model = randomise(pelt_fast.inject(copy.deepcopy(base), method))
    out, loss = loss_of(model.eval())
    loss.backward()
    assert gradients(model).keys() == {n for n in model.state_dict() if "pelt_" in n}
    count = pelt_fast.count_parameters(model)
    assert count.trainable == count.kept == sum(g.numel() for g in gradients(model).values())
    pelt_fast.save(model, tmp_path)
    other = pelt_fast.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(loss_of(other.eval())[0], out)
    with pelt_fast.disabled(model):
        assert torch.equal(loss_of(model)[0], plain)
    twin = copy.deepcopy(model)
    assert torch.equal(loss_of(twin)[0], out)
    merged, _ = loss_of(pelt_fast.merge(model))
    assert_same(merged, out)
    assert not torch.allclose(merged, plain, atol=1e-2)
    assert torch.equal(loss_of(pelt_fast.unmerge(model))[0], out)
    now = pelt_fast.eject(model).state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())
    assert torch.equal(loss_of(model)[0], plain)


def test_patterns_are_saved_and_exported(tmp_path):
    patterns = {r"layers\.0\..*_proj": dict(r=5), r"layers\.1\..*_proj": dict(r=2, alpha=8)}
    model = randomise(pelt_fast.inject(llama(), lora(4, targets="all-linear", patterns=patterns)))
    out, _ = loss_of(model.eval())
    base = pelt_fast.eject(copy.deepcopy(model))
    pelt_fast.save(model, tmp_path / "ours")
    again = pelt_fast.load(copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(loss_of(again.eval())[0], out)
    assert again._pelt.config == model._pelt.config
    pelt_fast.export_peft(model, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert_same(loss_of(theirs.eval())[0], out)


@pytest.mark.parametrize("maker", ["neox", "own"])
def test_peft_s_files_for_a_model_without_a_row(maker, tmp_path):
    names = ["dense_h_to_4h", "query_key_value"] if maker == "neox" else ["up", "down", "head"]
    base = MAKERS[maker]().requires_grad_(False)
    config = peft.LoraConfig(
        r=4, target_modules=names, rank_pattern={names[0]: 2}, init_lora_weights=False
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = pelt_fast.load_peft(copy.deepcopy(base), tmp_path).eval()
    assert_same(loss_of(ours)[0], loss_of(theirs)[0])
    pelt_fast.save(ours, tmp_path / "ours")
    again = pelt_fast.load(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(loss_of(again)[0], loss_of(ours)[0])


def test_what_other_formats_and_sums_cannot_hold_is_refused(tmp_path):
    patterns = {"0.*query": dict(r=3)}
    for method in (lora(2, targets=["query"]), lora(2, targets="q,v", patterns=patterns)):
        model = pelt_fast.inject(bert(), method)
        with pytest.raises(ValueError, match="no LoRA by name and no patterns"):
            pelt_fast.export_adapterhub(model, tmp_path)
    pelt_fast.eject(model)
    pelt_fast.inject_named(model, {"a": "lora", "b": method})
    with pytest.raises(ValueError, match="'b' has patterns"):
        pelt_fast.set_active(model, {"a": 0.5, "b": 0.5})


def test_named_methods_by_name():
    model = llama().eval()
    methods = {"a": lora(2, targets=["q_proj"]), "b": lora(3, targets=["q_proj"])}
    pelt_fast.inject_named(model, methods)
    pelt_fast.set_active(model, {"a": 0.5, "b": 0.5})
    assert {m.lora_a.shape[0] for m in sites_of(model).values()} == {5}


def test_a_recipe_names_modules(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "extends: sst2\nsizes: {}\nmethod:\n  preset: lora\n  r: 4\n  targets: [query, value]\n"
        "  patterns: {layer.0.*query: {r: 2}}\n"
    )
    recipe = recipes.load(str(file))
    wanted = lora(4, targets=["query", "value"], patterns={"layer.0.*query": dict(r=2)})
    assert recipe.config().modifications == wanted.modifications
    again = recipe.reworded(dict(dropout=0)).config().modifications
    assert again == lora(4, targets=["query", "value"], dropout=0,
                         patterns={"layer.0.*query": dict(r=2)}).modifications  # fmt: skip
