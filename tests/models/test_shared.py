"""One weight in two places: each looked at once, right in forward, not folded into."""

import copy

import pytest
import torch
from torch import nn

import pelt_fast
from pelt_fast import Modification, PeltConfig
from pelt_fast.layouts.layout import AttentionLayout, FFNLayout, Layout, StackLayout
from tests.models.judge import assert_near, exactly
from tests.models.test_inject import METHODS, same, snapshot, train_a_little
from tests.models.test_parity import assert_close, small_method
from tests.small import (
    MODELS,
    bart,
    bert,
    inputs,
    llama,
    outputs_and_gradients,
    pairs,
    randomise,
)

LAYERS = {
    "bart": "model.encoder.layers", "mbart": "model.encoder.layers",
    "roberta": "roberta.encoder.layer", "bert": "bert.encoder.layer", "llama": "model.layers",
}  # fmt: skip


def layers_of(model, architecture: str) -> nn.ModuleList:
    return model.get_submodule(LAYERS[architecture])


def tie(first: nn.Module, second: nn.Module) -> None:
    """Every linear layer of one reads the weights of the other's."""
    for a, b in zip(first.modules(), second.modules(), strict=True):
        if isinstance(a, nn.Linear):
            b.weight = a.weight
            b.bias = a.bias


def tied(architecture: str, **changes):
    model = MODELS[architecture](dropout=0.0, **changes)
    tie(*layers_of(model, architecture)[:2])
    return model


def twice(architecture: str):
    """A model that runs one layer object in two places (ALBERT)."""
    model = MODELS[architecture](dropout=0.0)
    layers = layers_of(model, architecture)
    layers[1] = layers[0]
    model.config.use_cache = False  # which would get the layer's keys twice
    return model


def untied(model):
    """The same function, every weight in one place."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    parameter.detach().clone(), parameter.requires_grad
                )
    return model


@pytest.mark.parametrize("architecture, method", pairs([m for m in METHODS if m != "bitfit"]))
def test_a_method_on_tied_layers_is_the_method_on_layers_of_their_own(architecture, method):
    model = tied(architecture)
    before, twin = snapshot(model), untied(model)
    randomise(pelt_fast.inject(model, small_method(method, dropout=0.0))).train()
    pelt_fast.inject(twin, small_method(method, dropout=0.0)).train()
    assert pelt_fast.count_parameters(model).kept == pelt_fast.count_parameters(twin).kept
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in own:
                parameter.copy_(own[name])
    batch = inputs(model, padding="right")
    logits, grads = outputs_and_gradients(model, batch)
    expected, expected_grads = outputs_and_gradients(twin, batch)
    assert grads.keys() == expected_grads.keys()
    assert_close({"logits": logits, **grads}, {"logits": expected, **expected_grads})
    outputs_and_gradients(model, batch)  # the second forward finds the weights where they were
    assert same(snapshot(pelt_fast.eject(model)), before)


@pytest.mark.parametrize("architecture, method", pairs(METHODS))
def test_a_layer_in_two_places_has_one_site(architecture, method):
    model = twice(architecture)
    before, batch = snapshot(model), inputs(model, padding="right")
    logits = model.eval()(**batch).logits
    pelt_fast.inject(model, small_method(method))
    sites = [site.name for site in pelt_fast.explain(model).sites]
    assert len(sites) == len(set(sites))
    head = pelt_fast.count_parameters(model).head
    kept = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
    if "prefix" not in method and "mam" not in method:  # whose MLP is folded away
        assert pelt_fast.count_parameters(model).kept == kept
    train_a_little(model)
    assert not torch.equal(model.eval()(**batch).logits, logits)
    assert same(snapshot(pelt_fast.eject(model)), before)
    assert torch.equal(model.eval()(**batch).logits, logits)


@pytest.mark.parametrize("method", ["lora", "lora_ffn"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_merge_into_a_shared_weight_is_refused_by_both_names(architecture, method):
    model = randomise(pelt_fast.inject(tied(architecture), small_method(method)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers?\.0\..*is the same weight as .*layers?\.1\."):
        pelt_fast.merge(model)
    assert same(snapshot(model), before) and not model._pelt.merged


def test_a_merge_of_a_layer_in_two_places_is_done_once():
    model = randomise(pelt_fast.inject(twice("llama"), small_method("lora", dropout=0.0))).eval()
    before, batch = snapshot(model), inputs(model)
    expected = model(**batch).logits
    exact = exactly(model, batch)["logits"]
    assert_near(pelt_fast.merge(model)(**batch).logits, expected, exact)
    assert same(snapshot(pelt_fast.unmerge(model)), before)


def test_a_weight_that_an_embedding_reads_is_not_folded_into():
    model = bert(hidden_size=32, vocab_size=32)
    model.bert.encoder.layer[
        0
    ].attention.self.query.weight = model.bert.embeddings.word_embeddings.weight
    randomise(pelt_fast.inject(model, small_method("lora")))
    with pytest.raises(ValueError, match=r"word_embeddings\.weight is the same weight as .*query"):
        pelt_fast.merge(model)


def test_a_merge_into_a_shared_bias_is_refused():
    model = bart(dropout=0.0)
    first, second = model.model.encoder.layers
    second.self_attn.out_proj.bias = first.self_attn.out_proj.bias
    adapter = Modification("bottleneck", "attention", "sequential", size=4, activation="identity")
    randomise(pelt_fast.inject(model, PeltConfig("x", (adapter,))))
    with pytest.raises(ValueError, match=r"out_proj\.bias is the same weight as"):
        pelt_fast.merge(model)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_shared_ffn_is_not_packed_and_its_neighbours_are(architecture):
    model = MODELS[architecture](dropout=0.0)
    one = layers_of(model, architecture)
    paths = [n for n, m in one[0].named_modules() if isinstance(m, nn.Linear)]
    last = paths[-1]
    one[1].get_submodule(last).weight = one[0].get_submodule(last).weight
    pelt_fast.inject(model, small_method("scaled_parallel_adapter"))
    plans = [site.plan for site in pelt_fast.explain(model).sites]
    assert not any(plan.startswith("packed") for plan in plans[:2])
    assert all(plan.startswith("packed") for plan in plans[2:])


def test_q_and_k_that_are_one_layer_have_one_lora():
    model = llama(num_key_value_heads=4)
    for layer in model.model.layers:
        layer.self_attn.k_proj = layer.self_attn.q_proj
    before = snapshot(model)
    both = [Modification("low_rank", f"attention.{which}", size=3) for which in "qk"]
    pelt_fast.inject(model, PeltConfig("x", tuple(both)))
    assert len(pelt_fast.explain(model).sites) == 2
    train_a_little(model)
    assert same(snapshot(pelt_fast.eject(model)), before)
    other = Modification("low_rank", "attention.k", size=5)
    with pytest.raises(ValueError, match=r"q_proj and .*k_proj are one layer"):
        pelt_fast.inject(model, PeltConfig("x", (both[0], other)))
    assert same(snapshot(model), before)


@pytest.mark.parametrize(
    "method", ["lora", "prefix", "houlsby", "mam", "multi_head_parallel_adapter"]
)
def test_stacks_that_overlap_have_each_layer_once(method):
    """A row that names a layer in two stacks, as drafts of Swin's stages do."""
    attention = AttentionLayout("encoder", "attention.self", "attention.self.query",
                              "attention.self.key", "attention.self.value",
                              "attention.output.dense")  # fmt: skip
    ffn = FFNLayout("intermediate.dense", "intermediate.dense", "output.dense",
                  "intermediate.intermediate_act_fn", "hidden_act")  # fmt: skip
    model = bert(dropout=0.0)
    model.bert.first = nn.ModuleList([model.bert.encoder.layer[0]])
    stacks = tuple(
        StackLayout("encoder", "encoder", path, (attention,), ffn)
        for path in ("first", "encoder.layer")
    )
    before = snapshot(model)
    pelt_fast.inject(model, small_method(method), layout=Layout("bert", stacks))
    names = [site.name for site in pelt_fast.explain(model).sites]
    assert len(names) == len(set(names)) and names[0].startswith("first.0")
    assert any(name.startswith("encoder.layer.1") for name in names)
    train_a_little(model)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert same(snapshot(pelt_fast.eject(model)), before)


def test_a_block_that_two_layers_spell_out_is_refused():
    model = bart()
    first, second = model.model.encoder.layers
    second.fc1 = first.fc1
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.0\.fc1 and .*layers\.1\.fc1 are one block"):
        pelt_fast.inject(model, small_method("scaled_parallel_adapter"))
    assert same(snapshot(model), before) and "_pelt" not in vars(model)


def test_a_block_module_that_two_layers_share_has_one_adapter():
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    before = snapshot(model)
    pelt_fast.inject(model, small_method("scaled_parallel_adapter"))
    assert len(pelt_fast.explain(model).sites) == 1
    train_a_little(model)
    assert same(snapshot(pelt_fast.eject(model)), before)
