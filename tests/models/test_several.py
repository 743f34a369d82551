"""Several named methods in one model: switching is exact, a sum is the sum of the updates."""

import copy

import pytest
import torch

import pelt_fast
from pelt_fast.layouts.lookup import base_of
from tests.models.judge import assert_near, exactly
from tests.models.test_compile import compiled
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, gradients, inputs, randomise


def alone(plain, method):
    """The method by itself, with values of its own."""
    return randomise(pelt_fast.inject(copy.deepcopy(plain), method)).eval()


def folders(plain, methods: dict, tmp_path) -> tuple[dict, dict]:
    """Each method by itself, and the folders they are saved in."""
    models = {name: alone(plain, method) for name, method in methods.items()}
    for name, model in models.items():
        pelt_fast.save(model, tmp_path / name)
    return models, {name: tmp_path / name for name in methods}


def built(architecture="bart"):
    torch.manual_seed(0)
    return MODELS[architecture](dropout=0.0).eval()


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("architecture", ["bart", "roberta", "llama"])
def test_each_method_is_what_it_is_alone(architecture, tmp_path):
    plain = built(architecture)
    methods = {name: small_method(name) for name in ("lora", "mam", "houlsby", "prompt")}
    models, found = folders(plain, methods, tmp_path)
    several = pelt_fast.inject_named(copy.deepcopy(plain), found).eval()
    batch = inputs(plain, padding="right")
    assert pelt_fast.active(several) == {"lora": 1.0}
    for name in ("houlsby", "lora", "prompt", "mam", "lora"):
        pelt_fast.set_active(several, name)
        assert torch.equal(logits_of(several, batch), logits_of(models[name], batch)), name
    pelt_fast.eject(several)
    assert torch.equal(logits_of(several, batch), logits_of(plain, batch))


def test_what_a_method_learned_is_kept_while_another_works():
    model = pelt_fast.inject_named(
        built("roberta"), {"a": small_method("lora"), "b": small_method("mam")}
    ).train()
    batch = inputs(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    pelt_fast.set_active(model, "b")
    pelt_fast.set_active(model, "a")
    again = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert again.keys() == trained.keys()
    assert all(torch.equal(again[name], value) for name, value in trained.items())


def test_a_sum_of_loras_is_the_sum_of_their_matrices(tmp_path):
    plain = built("llama")
    q, v = small_method("lora").modifications
    wide = pelt_fast.PeltConfig("wide", tuple(
        pelt_fast.Modification(**{**m.__dict__, "size": 7, "scale": 0.5}) for m in (q, v)
    ))  # fmt: skip
    models, found = folders(plain, {"a": small_method("lora"), "b": wide}, tmp_path)
    several = pelt_fast.inject_named(copy.deepcopy(plain), found).eval()
    pelt_fast.set_active(several, {"a": 0.7, "b": -1.5})

    by_hand = copy.deepcopy(plain).double()
    for name, weight in (("a", 0.7), ("b", -1.5)):
        for site in models[name]._pelt.sites:
            linear = by_hand.get_submodule(f"model.{site.name}")
            update = site.module.lora_b.double() @ site.module.lora_a.double()
            linear.weight.data += weight * site.module.scale * update
    batch = inputs(plain)
    same = copy.deepcopy(by_hand).float()
    assert_near(logits_of(several, batch), logits_of(same, batch), logits_of(by_hand, batch))
    assert sum(p.requires_grad for p in several.parameters()) == 0


def update_of(module, x):
    """s Δ(x) of a bottleneck, by its definition."""
    hidden = torch.relu(x @ module.down_weight.to(x).T + module.down_bias.to(x))
    return module.scale * (hidden @ module.up_weight.to(x).T + module.up_bias.to(x))


@pytest.mark.parametrize("sizes", [(5, 5), (3, 8)])
def test_a_sum_of_parallel_adapters_is_the_sum_of_their_updates(sizes, tmp_path):
    plain = built("llama")
    preset = pelt_fast.methods()["scaled_parallel_adapter"]
    methods = {name: preset.replace(size=size) for name, size in zip("ab", sizes)}
    models, found = folders(plain, methods, tmp_path)
    several = pelt_fast.inject_named(copy.deepcopy(plain), found).eval()
    weights = {"a": 0.25, "b": 2.0}
    pelt_fast.set_active(several, weights)

    def hooked(dtype):
        twin = copy.deepcopy(plain).to(dtype)
        for index, layer in enumerate(base_of(twin).layers):
            parts = [(w, models[name]._pelt.sites[index].module) for name, w in weights.items()]

            def add(module, args, output, parts=parts):
                return output + sum(w * update_of(part, args[0]) for w, part in parts)

            layer.mlp.register_forward_hook(add)
        return twin

    batch = inputs(plain)
    same, exact = (logits_of(hooked(d), batch) for d in (torch.float32, torch.float64))
    assert_near(logits_of(several, batch), same, exact)


def test_a_sum_of_prefixes_sees_the_keys_of_both(tmp_path):
    plain = built("bart")
    config = small_method("prefix_nomlp")
    models, found = folders(plain, {"a": config, "b": config}, tmp_path)
    several = pelt_fast.inject_named(copy.deepcopy(plain), found).eval()
    pelt_fast.set_active(several, {"a": 1, "b": 1})
    both = pelt_fast.inject(copy.deepcopy(plain), config.replace(size=10)).eval()
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if parameter.requires_grad:
                parts = [dict(models[m].named_parameters())[name] for m in "ab"]
                parameter.copy_(torch.cat(parts, 3))
    batch = inputs(plain, padding="left")
    assert torch.equal(logits_of(several, batch), logits_of(both, batch))


def test_heads_and_biases_add_their_changes():
    plain = built("roberta")
    several = pelt_fast.inject_named(
        copy.deepcopy(plain), {"a": small_method("bitfit"), "b": small_method("lora")}
    ).eval()
    trained = {}
    for name in "ab":
        randomise(pelt_fast.set_active(several, name))
        trained[name] = {
            n: p.detach().clone() for n, p in several.named_parameters() if p.requires_grad
        }
    pelt_fast.set_active(several, {"a": 0.5, "b": 0.25})
    after = dict(several.named_parameters())
    for name, before in plain.named_parameters():

        def added(dtype, name=name, before=before):
            wide = before.detach().to(dtype)
            parts = [(0.5, trained["a"].get(name)), (0.25, trained["b"].get(name))]
            return wide + sum(w * (t.to(dtype) - wide) for w, t in parts if t is not None)

        assert_near(after[name], added(torch.float32), added(torch.float64))


def test_a_saved_sum_is_a_method_of_its_own(tmp_path):
    plain = built("llama")
    _, found = folders(plain, {"a": small_method("lora"), "b": small_method("mam")}, tmp_path)
    several = pelt_fast.set_active(
        pelt_fast.inject_named(copy.deepcopy(plain), found).eval(), {"a": 0.5, "b": 1}
    )
    pelt_fast.save(several, tmp_path / "sum")
    loaded = pelt_fast.load(copy.deepcopy(plain), tmp_path / "sum").eval()
    batch = inputs(plain)
    assert torch.equal(logits_of(loaded, batch), logits_of(several, batch))


def test_switching_and_weighting_compile_nothing_again():
    torch.manual_seed(0)
    config = small_method("mam", dropout=0.0)
    plain = built("roberta")
    plain.config.problem_type = "single_label_classification"  # else set by the first forward
    model = pelt_fast.inject_named(copy.deepcopy(plain), {"a": config, "b": config}).eval()
    for name in ("a", "b"):
        randomise(pelt_fast.set_active(model, name))
    batch = inputs(model)
    run, graphs = compiled(model)
    outputs, once = [], 0
    for name in ("a", "b", "a"):
        pelt_fast.set_active(model, name)
        outputs.append(logits_of(run, batch))
        once = once or len(graphs)
    assert len(graphs) == once
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])

    lora = small_method("lora", dropout=0.0)
    model = pelt_fast.inject_named(plain, {"a": lora, "b": lora}).eval()
    (run, graphs), once = compiled(model), 0
    for weights in ({"a": 1, "b": 0}, {"a": 0, "b": 1}, {"a": 0.5, "b": 0.5}):
        pelt_fast.set_active(model, weights)
        logits_of(run, batch)
        once = once or len(graphs)
    assert len(graphs) == once


@pytest.mark.parametrize("weights, message", [
    ("c", "no method is named 'c'; there are a, b"),
    ({}, "at least one method"),
    ({"a": float("nan")}, "must be a finite number, got nan"),
    ({"a": 0.5, "b": 1.0}, "its weight can be 1 or 0, got 0.5"),
])  # fmt: skip
def test_what_cannot_be_activated_is_refused_and_nothing_changes(weights, message):
    methods = {"a": small_method("mam"), "b": small_method("lora")}
    model = pelt_fast.inject_named(built("bart"), methods).eval()
    batch = inputs(model)
    before = logits_of(model, batch)
    with pytest.raises(ValueError, match=message):
        pelt_fast.set_active(model, weights)
    assert pelt_fast.active(model) == {"a": 1.0}
    assert torch.equal(logits_of(model, batch), before)


def test_places_that_no_one_method_holds_twice_are_refused():
    model = pelt_fast.inject_named(
        built("bart"), {"a": small_method("houlsby"), "b": small_method("houlsby")}
    )
    with pytest.raises(ValueError, match="an adapter with a LayerNorm on attention"):
        pelt_fast.set_active(model, {"a": 1, "b": 1})
    with pytest.raises(ValueError, match="'b' is full fine-tuning"):
        pelt_fast.inject_named(built("bart"), {"a": "lora", "b": "full"})
    with pytest.raises(ValueError, match="has no named methods"):
        pelt_fast.set_active(built("bart"), "a")


def test_a_sum_does_not_train():
    methods = {"a": small_method("lora"), "b": small_method("lora")}
    model = pelt_fast.set_active(
        pelt_fast.inject_named(built("roberta"), methods), {"a": 1, "b": 1}
    )
    assert not gradients(model) and not any(p.requires_grad for p in model.parameters())
    pelt_fast.set_active(model, "b")
    assert any(p.requires_grad for p in model.parameters())


def test_a_copy_has_its_own_methods():
    methods = {"a": small_method("lora"), "b": small_method("mam")}
    model = pelt_fast.inject_named(built("bart"), methods).eval()
    batch = inputs(model)
    twin = copy.deepcopy(model)
    pelt_fast.set_active(twin, "b")
    assert pelt_fast.active(model) == {"a": 1.0}
    randomise(twin)
    assert exactly(model, batch)["logits"].shape == logits_of(twin, batch).shape


@pytest.mark.parametrize("method", ["lora", "mam"])
@pytest.mark.parametrize("architecture", ["gpt2", "modernbert", "phi3", "t5", "vit", "whisper"])
def test_a_weight_of_zero_takes_a_method_out(architecture, method):
    """On parts of fused projections and beside every kind of FFN."""
    torch.manual_seed(0)
    model = MORE[architecture](dropout=0.0).eval()
    config = small_method(method, dropout=0.0)
    pelt_fast.inject_named(model, {"a": config, "b": config.replace(size=3)})
    for name in "ab":
        randomise(pelt_fast.set_active(model, name))
    batch = inputs(model)
    alone, other = (logits_of(pelt_fast.set_active(model, name), batch) for name in "ab")
    exact = exactly(pelt_fast.set_active(model, "a"), batch)["logits"]
    weighed = logits_of(pelt_fast.set_active(model, {"a": 1, "b": 0}), batch)
    assert_near(weighed, alone, exact)
    assert not torch.allclose(alone, other, atol=1e-2)
