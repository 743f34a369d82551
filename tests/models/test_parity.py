"""Injected models against independent formulations: hooks, concatenation, PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pelt_fast
from pelt_fast.injection import attention_interface as attention
from pelt_fast.injection.attention_interface import SLICE
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from pelt_fast.ops.common import dispatch as support
from tests.models.judge import assert_near, exactly
from tests.small import MODELS, gradients, inputs, outputs_and_gradients, pairs, randomise

METHODS = [name for name in pelt_fast.methods() if name != "linear_probe"]
PADDINGS = [None, "right", "left"]


# Where a budget judges every gradient of a model, a tensor needs more than five numbers: the
# reference's own error in so few is a draw, now and then far smaller than usual
JUDGED_SIZE = 15


def small_method(name, size=5, **changes):
    """A preset, its ranks small enough for small models."""
    config = pelt_fast.methods()[name]
    return config if config.is_full else config.replace(size=size, **changes)


def injected(architecture, method, dropout=0.1, **changes):
    model = MODELS[architecture](dropout=dropout)
    config = method if not isinstance(method, str) else small_method(method)
    return randomise(pelt_fast.inject(model, config), **changes)


def assert_close(actual, expected, tolerance=2e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size = value.abs().max().item() + 1e-3
        assert (actual[name] - value).abs().max().item() <= tolerance * size, name


def assert_fused_equals_reference(model, batch):
    """Output and every gradient, both under the same dropout masks; returns ours."""
    logits, grads = outputs_and_gradients(model, batch)
    with pelt_fast.backend("reference"):
        expected, expected_grads = outputs_and_gradients(model, batch)
    # fixed: one draw under dropout is up to five times further from fp64 than another, on either
    # path; tests/parity/grid.py judges every method by a budget over a whole model
    assert torch.allclose(logits, expected, atol=1e-5)
    assert_close(grads, expected_grads)
    return logits, grads


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture, method", pairs(METHODS))
def test_fused_equals_reference_with_every_dropout_on(architecture, method, padding):
    model = injected(architecture, method).train()
    assert_fused_equals_reference(model, inputs(model, padding=padding))


@pytest.mark.parametrize("architecture, method", pairs(METHODS))
def test_fused_equals_reference_in_evaluation(architecture, method):
    model = injected(architecture, method).eval()
    for padding in PADDINGS:
        batch = inputs(model, padding=padding)
        logits, _ = assert_fused_equals_reference(model, batch)
        exact = exactly(model, batch)["logits"]
        with torch.no_grad():
            assert_near(model(**batch).logits, logits, exact)


def naive_ffn_adapters(model, twin):
    """Forward hooks on ``twin`` (no method inside) that add ``model``'s parallel adapters."""
    for stack in stacks_of(twin):
        layers = find(base_of(model), stack.layers)
        for layer, plain in zip(layers, find(base_of(twin), stack.layers), strict=True):
            site = layer.pelt_ffn_adapter
            kept = {}

            def catch(module, arguments, kept=kept):
                kept["x"] = arguments[0]

            def update(site=site, kept=kept):
                h = F.relu(F.linear(kept["x"], site.down_weight, site.down_bias))
                return site.scale * F.linear(h, site.up_weight, site.up_bias)

            reads = stack.ffn.norm if stack.ffn.adapter_reads == "residual" else stack.ffn.entry
            find(plain, reads).register_forward_pre_hook(catch)
            if stack.ffn.adapter_reads == "residual":  # mBART: what leaves the layer is their sum
                plain.register_forward_hook(
                    lambda module, arguments, output, update=update: output + update()
                )
            elif hasattr(plain, "final_layer_norm"):  # BART: what enters the norm is residual + ffn
                plain.final_layer_norm.register_forward_pre_hook(
                    lambda module, arguments, update=update: (arguments[0] + update(),)
                )
            else:
                name = "mlp" if stack.ffn.is_container else "output.dropout"
                find(plain, name).register_forward_hook(
                    lambda module, arguments, output, update=update: output + update()
                )


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", MODELS)
def test_scaled_parallel_adapter_is_the_papers_placement(architecture, padding):
    plain = MODELS[architecture](dropout=0.0)
    model = randomise(pelt_fast.inject(copy.deepcopy(plain), small_method(
        "scaled_parallel_adapter", dropout=0.0)))  # fmt: skip
    for name, parameter in plain.named_parameters():  # the task head was randomised too
        parameter.data.copy_(dict(model.named_parameters())[name])
    wide, wide_plain = (copy.deepcopy(m).double().train() for m in (model, plain))
    naive_ffn_adapters(model, plain)
    naive_ffn_adapters(wide, wide_plain)
    batch = inputs(model, padding=padding)
    logits, grads = outputs_and_gradients(model.train(), batch)
    model.zero_grad()
    plain.train().requires_grad_(False)
    out = plain(**batch)
    out.loss.backward()
    assert_near(logits, out.logits, wide_plain(**batch).logits)
    assert_close(grads, gradients(model) | {n: g for n, g in grads.items() if "pelt_" not in n})


def concatenating(module, query, key, value, mask, dropout=0.0, scaling=None, **kwargs):
    """Prefix tuning the textbook way: widen keys, values and mask, one softmax."""
    site = module.__dict__[SLICE]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    prefixes = [p.repeat_interleave(group, 0).expand(query.shape[0], -1, -1, -1) for p in site(1)]
    scores = scaling * query @ torch.cat([prefixes[0], key], 2).transpose(-1, -2)
    if mask is not None:
        scores = scores + F.pad(mask, (prefixes[0].shape[2], 0))
    weights = torch.softmax(scores, -1)
    return (weights @ torch.cat([prefixes[1], value], 2)).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register("pelt_fast_concatenating", concatenating)
ALL_MASK_ATTENTION_FUNCTIONS.register(
    "pelt_fast_concatenating", ALL_MASK_ATTENTION_FUNCTIONS["eager"]
)


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", MODELS)
def test_prefix_equals_concatenation(architecture, padding, choice, monkeypatch):
    model = MODELS[architecture](dropout=0.0)
    model.set_attn_implementation(choice)
    pelt_fast.inject(model, small_method("prefix"))
    assert model.config._attn_implementation == f"pelt_fast_{choice}"
    randomise(model, 0.5).train()
    batch = inputs(model, padding=padding)
    logits, grads = outputs_and_gradients(model, batch)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "pelt_fast_concatenating"
    monkeypatch.setattr(attention, "WRAPPED", ("concatenating",))
    expected, expected_grads = outputs_and_gradients(model, batch)
    exact = copy.deepcopy(model).double()(**batch).logits
    rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if logits.dim() == 3:  # a padding position's own output means nothing
        logits, expected, exact = logits[rows], expected[rows], exact[rows]
    if architecture == "llama":  # its loss counts padded positions too: compare outputs alone
        grads = expected_grads = {}
    assert_near(logits, expected, exact)
    assert_close(grads, expected_grads)


@pytest.mark.parametrize("architecture", MODELS)
def test_prefix_changes_padded_and_unpadded_batches(architecture):
    """AdapterHub's prefix has no effect at all on padded batches."""
    model = MODELS[architecture](dropout=0.0).eval()
    batches = [inputs(model, padding=padding) for padding in PADDINGS]
    before = [model(**batch).logits for batch in batches]
    randomise(pelt_fast.inject(model, small_method("prefix")), 1.0)
    for batch, plain in zip(batches, before, strict=True):
        assert (model(**batch).logits - plain).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("architecture", MODELS)
def test_changing_the_attention_under_a_prefix_is_an_error_not_a_dropped_prefix(architecture):
    model = injected(architecture, "prefix").eval()
    batch = inputs(model)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="its attention is 'eager' now"):
        model(**batch)
    pelt_fast.inject(pelt_fast.eject(model), small_method("prefix"))
    model(**batch)


def test_prefix_leaves_causality_alone():
    """AdapterHub shifts it: a token then no longer sees the last P before it."""
    model = injected("llama", "prefix", 0.0).eval()
    ids = inputs(model)["input_ids"]
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 50 + 4
    moved = (model(ids).logits - model(changed).logits).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [i >= 4 for i in range(ids.shape[1])]


def test_prefix_reaches_the_encoder_of_an_encoder_decoder():
    """PEFT's changes it by exactly 0."""
    model = MODELS["bart"](dropout=0.0).eval()
    ids = inputs(model)["input_ids"]
    before = model.get_encoder()(ids).last_hidden_state
    randomise(pelt_fast.inject(model, small_method("prefix")), 1.0)
    assert (model.get_encoder()(ids).last_hidden_state - before).abs().max() > 1e-3


def factors_of(model) -> dict[str, torch.nn.Parameter]:
    """The LoRA factors of a PEFT model, by the names that its layers have without PEFT."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("architecture", MODELS)
def test_lora_equals_peft(architecture):
    plain = MODELS[architecture](dropout=0.0)
    names = {"bert": ["query", "value"], "roberta": ["query", "value"]}
    targets = names.get(architecture, ["q_proj", "v_proj"])
    config = LoraConfig(r=5, lora_alpha=10, target_modules=targets, init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(plain), config)
    ours = pelt_fast.inject(copy.deepcopy(plain), small_method("lora", dropout=0.0))
    factors, pairs = factors_of(theirs), []
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "pelt_lora" in name:
                name = name.replace("pelt_lora.lora_a", "lora_A").replace(
                    "pelt_lora.lora_b", "lora_B"
                )
                parameter.copy_(factors[name])
                pairs.append((parameter, name))
    assert len(pairs) == len(factors)
    batch = inputs(plain, padding="right")
    exact = copy.deepcopy(theirs).double()
    results = [model.train()(**batch) for model in (ours, theirs, exact)]
    for result in results:
        result.loss.backward()
    assert_near(*(result.logits for result in results))
    wide = factors_of(exact)
    for mine, name in pairs:
        assert_near(mine.grad, factors[name].grad, wide[name].grad)


def test_lora_draws_its_own_mask_at_every_module():
    model = injected("llama", "lora").train()
    masks = []
    for module in model.modules():
        if hasattr(module, "pelt_lora"):
            site = module.pelt_lora
            site.lora_a.data.copy_(torch.eye(32)[:5])
            site.lora_b.data.copy_(torch.eye(site.lora_b.shape[0], 5))
            y = site(torch.ones(200, 32)) - module.weight.sum(1)
            masks.append((y[:, :5] > site.scale / 2).tolist())
    assert all(a != b for i, a in enumerate(masks) for b in masks[:i])


def test_combinations_fall_back_to_the_layers_own_ffn_with_the_reason():
    """LoRA inside an FFN that carries a parallel adapter: right, and explain says so."""
    lora, adapter = (
        pelt_fast.methods()[n].modifications for n in ("lora_ffn", "scaled_parallel_adapter")
    )
    config = pelt_fast.PeltConfig("both", (*lora, *adapter)).replace(size=5, dropout=0.0)
    for architecture in MODELS:
        plain = MODELS[architecture](dropout=0.0)
        model = randomise(pelt_fast.inject(copy.deepcopy(plain), config)).train()
        explanation = pelt_fast.explain(model)
        reasons = {site.reason for site in explanation.fallbacks}
        assert len(reasons) == 1 and "LoRA on it" in reasons.pop()
        batch = inputs(model)
        logits, _ = outputs_and_gradients(model, batch)
        with torch.no_grad():  # fold the LoRA into the twin's weights
            for name, module in model.named_modules():
                if hasattr(module, "pelt_lora"):
                    site = module.pelt_lora
                    plain.get_submodule(name).weight += site.scale * site.lora_b @ site.lora_a
            for name, parameter in plain.named_parameters():
                if "classifier" in name:
                    parameter.copy_(dict(model.named_parameters())[name])
        naive_ffn_adapters(model, plain)
        # ours sets the budget: the twin shares no line with it and must be as near to fp64
        assert_near(plain(**batch).logits, logits, exactly(model, batch)["logits"])


def test_the_fallback_beside_the_ffn_is_said_and_strict_refuses_it(monkeypatch, caplog):
    adapter = pelt_fast.methods()["scaled_parallel_adapter"].replace(size=5, layer_norm="in")
    model = pelt_fast.inject(MODELS["roberta"](), adapter)
    support._say_once.cache_clear()
    model(**inputs(model))
    assert caplog.text.count("the adapter has a LayerNorm of its own") == 1
    monkeypatch.setenv("PELT_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="LayerNorm of its own"):
        model(**inputs(model))


NORMS = {  # what the layer's input, the attention's norm and the FFN's norm are called
    "bart": ("model.encoder.layers.0", "self_attn_layer_norm", "final_layer_norm"),
    "roberta": ("roberta.encoder.layer.0", "attention.output.LayerNorm", "output.LayerNorm"),
}


@pytest.mark.parametrize("method", ["scaled_parallel_adapter", "mam", "houlsby", "lora"])
@pytest.mark.parametrize("architecture", NORMS)
def test_every_dropout_of_the_model_still_acts_exactly_once(architecture, method):
    """What a sub-layer adds to the residual is zero with probability p: twice dropped, 1-(1-p)^2."""
    model = MODELS[architecture](dropout=0.5)
    config = small_method(method, dropout=0.0)
    if method == "houlsby":  # its own residual would add to what was dropped
        config = config.replace(init="lora")
    pelt_fast.inject(model, config).train()
    layer_name, first, second = NORMS[architecture]
    layer, seen = model.get_submodule(layer_name), {}
    layer.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    norms = layer.get_submodule(first), layer.get_submodule(second)
    norms[0].register_forward_hook(lambda m, a, out: seen.update(into_first=a[0], middle=out))
    norms[1].register_forward_pre_hook(lambda m, a: seen.update(into_second=a[0]))
    batch = inputs(model, batch=16, length=20)
    model(**batch)
    for added, residual in ((seen["into_first"], seen["x"]), (seen["into_second"], seen["middle"])):
        share = (added == residual).double().mean().item()
        assert abs(share - 0.5) < 0.03, share
    model.eval()(**batch)
    assert (seen["into_second"] == seen["middle"]).double().mean() < 0.01
