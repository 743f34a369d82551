"""Dropouts, the model's and the method's, act by the p and the mode they have when they run."""

import pytest
import torch
from torch import nn

import pelt_fast
from tests.models.test_parity import small_method
from tests.models.test_read_late import ALL, base, layers_and_ffns, put, randomise
from tests.small import inputs

PRESETS = [n for n in pelt_fast.methods() if n not in ("full", "linear_probe", "bitfit")]


def injected(architecture, name, dropout=0.5, own=0.5, **changes):
    torch.manual_seed(0)
    model = ALL[architecture](dropout=dropout)
    config = small_method(name, **changes)
    for form in ("low_rank", "bottleneck"):
        if all(m.form == form and m.reads != "query" for m in config.modifications):
            config = config.replace(dropout=own)
    return randomise(pelt_fast.inject(model, config)).train()


def spread(model):
    """How far two forwards are apart."""
    batch = inputs(model)
    with torch.no_grad():
        return (model(**batch).logits - model(**batch).logits).abs().max().item()


def disable(model):
    """What TRL's disable_dropout_in_model does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_dropout_that_trl_disables_is_off(architecture, name):
    model = injected(architecture, name)
    assert spread(model) > 0
    model.config.attn_pdrop = model.config.attention_probs_dropout_prob = 0.0
    disable(model)
    assert spread(model) == 0


@pytest.mark.parametrize("name, changes", [
    ("lora", {}), ("lora_ffn", {}), ("houlsby", {}), ("parallel_adapter_ffn", {}),
    ("multi_head_parallel_adapter", dict(reads="input")),
])  # fmt: skip
def test_a_methods_own_dropout_is_a_module(name, changes):
    model = injected("gpt2", name, dropout=0.0, **changes)
    assert spread(model) > 0
    keys = set(model.state_dict())
    own = [m for n, m in model.named_modules() if "pelt_" in n and isinstance(m, nn.Dropout)]
    assert own and not any("dropout" in key for key in keys)
    for dropout in own:
        dropout.eval()
    assert spread(model) == 0
    model.eval()
    own[0].train()  # MC dropout of one site
    assert spread(model) > 0


def test_the_attentions_dropout_acts_on_what_reads_its_query():
    model = injected("gpt2", "multi_head_parallel_adapter", dropout=0.0)
    assert spread(model) == 0
    assert not any("pelt_" in n and isinstance(m, nn.Dropout) for n, m in model.named_modules())
    attention = model.transformer.h[0].attn
    attention.attn_dropout.p = 0.5
    for key_or_value in attention.c_attn.weight.data[:, 32:].split(32, 1):
        key_or_value.zero_()  # the context gives nothing that could be dropped
    attention.c_attn.bias.data[32:] = 0
    assert spread(model) > 0


@pytest.mark.parametrize("name", ["houlsby", "scaled_parallel_adapter", "lora_ffn"])
@pytest.mark.parametrize("architecture", ["gpt2", "bert", "t5", "modernbert"])
def test_one_dropout_of_the_models_in_training_in_evaluation(architecture, name):
    model = injected(architecture, name).eval()
    assert spread(model) == 0
    layer, slot = next(layers_and_ffns(model))
    module = layer.get_submodule(slot.output_dropout or slot.activation_dropout)
    module.train()
    assert spread(model) > 0
    module.p = 0.0
    assert spread(model) == 0


@pytest.mark.parametrize("name", ["houlsby", "scaled_parallel_adapter", "mam"])
@pytest.mark.parametrize("architecture", ["bart", "opt"])
def test_a_probability_written_later_is_the_layers(architecture, name):
    """Written as a float on the layer: off is off, on is on once, and eject gives it back."""
    model = injected(architecture, name, own=0.0)
    disable(model)
    for module in model.modules():
        for attribute in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(module.__dict__.get(attribute), (float, bool)):
                setattr(module, attribute, 0.0)
    assert spread(model) == 0
    layer, _ = next(layers_and_ffns(model))
    layer.dropout = 0.999
    assert spread(model) > 0
    written = layer.dropout
    assert written is False  # the site's again
    pelt_fast.eject(model)
    assert layer.dropout == 0.999
    assert all(other.dropout == 0.0 for other, _ in list(layers_and_ffns(model))[1:])


def test_the_dropped_share_is_the_written_one():
    """Neither twice nor to another share: of a block that gives ones, 0.25 are zero."""
    model = base("bart").train()
    pelt_fast.inject(model, small_method("scaled_parallel_adapter", dropout=0.0))
    layer = model.model.encoder.layers[0]
    layer.fc2.weight.data.zero_()
    layer.fc2.bias.data.fill_(1.0)
    layer.dropout = 0.25
    seen = []
    layer.final_layer_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    residual = []
    layer.self_attn_layer_norm.register_forward_hook(lambda m, a, y: residual.append(y))
    model(**inputs(model, batch=16, length=32))
    dropped = seen[0] - residual[0]
    assert set((3 * dropped).round().unique().tolist()) == {0.0, 4.0}
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.02


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_parts_whose_dropouts_differ_drop_their_own_input(architecture):
    model = injected(architecture, "lora", dropout=0.0)
    sites = [site.module for site in pelt_fast.injection.record.injection_of(model).sites]
    for site in sites[::2]:
        site.dropout.p = 0.0
    assert spread(model) > 0
    for site in sites:
        site.dropout.p = 0.0
    assert spread(model) == 0


def test_a_dropout_replaced_by_something_else():
    model = injected("bert", "scaled_parallel_adapter", own=0.0)
    disable(model)
    put(model.bert.encoder.layer[0], "output.dropout", nn.Dropout(0.5))
    assert spread(model) > 0
    put(model.bert.encoder.layer[0], "output.dropout", nn.Identity())
    assert spread(model) == 0


@pytest.mark.parametrize("architecture, name, owner, attribute", [
    ("llama", "lora", "self_attn", "q_proj"), ("llama", "scaled_parallel_adapter", "", "mlp"),
    ("bart", "scaled_parallel_adapter", "", "fc1"), ("bart", "houlsby", "", "fc2"),
    ("bert", "mam", "output", "dense"), ("mbart", "mam", "", "final_layer_norm"),
    ("bart", "houlsby", "self_attn", "out_proj"), ("llama", "prefix", "", "self_attn"),
])  # fmt: skip
def test_a_module_replaced_under_a_site_is_an_error(architecture, name, owner, attribute):
    import copy

    model = base(architecture)
    twin = copy.deepcopy(model)
    pelt_fast.inject(model, small_method(name))
    layer, _ = next(layers_and_ffns(model))
    other, _ = next(layers_and_ffns(twin))
    setattr(layer.get_submodule(owner), attribute, getattr(other.get_submodule(owner), attribute))
    with pytest.raises(RuntimeError, match=rf"{attribute} is .* now, not the"):
        model(**inputs(model))


def test_a_wrapper_of_a_sites_module_is_none():
    model = base("llama")
    pelt_fast.inject(model, small_method("lora"))
    attention = model.model.layers[0].self_attn
    batch = inputs(model)
    expected = model(**batch).logits
    attention.q_proj = nn.Sequential(attention.q_proj)
    assert torch.equal(model(**batch).logits, expected)
