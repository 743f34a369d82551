"""Quantised bases on the fast path: the same numbers, masks and saved bytes as a plain base has, the
sites fused, and PEFT's models too."""

import copy
import dataclasses

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn

import pelt_fast
from benchmarks.common import saved_bytes
from pelt_fast.modules import ParallelFFNAdapter
from tests.models.test_parity import assert_close, small_method
from tests.models.test_quantised import QUANTISED, Float8Linear, Int8Linear, base, own, readable
from tests.small import MODELS, MORE, gradients, inputs, randomise


def twins(architecture: str, quantise, method, **changes) -> list[nn.Module]:
    """A quantised model and the plain one it stands for, with the same method, in training."""
    method = small_method(method, **changes) if isinstance(method, str) else method
    return with_method(base(architecture, quantise), method)


def with_method(model: nn.Module, method) -> list[nn.Module]:
    """The same of a quantised model."""
    plain = readable(copy.deepcopy(model))
    for each in (model, plain):
        torch.manual_seed(1)
        randomise(pelt_fast.inject(each, method)).train()
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
    return [model, plain]


def results(model: nn.Module, batch) -> dict:
    torch.manual_seed(7)
    out = model(**batch)
    out.loss.backward()
    return {"logits": out.logits.detach(), **gradients(model)}


@pytest.mark.parametrize("quantise", QUANTISED)
def test_lora_inside_an_ffn_with_an_adapter_is_the_same_on_the_plain_base(quantise):
    """The projections compute their own products, with the LoRA on them."""
    low_rank = pelt_fast.lora(r=4, alpha=8, targets="ffn.in,ffn.out", dropout=0.0)
    both = low_rank + pelt_fast.parallel_adapter(r=8, dropout=0.0)
    model, plain = twins("llama", quantise, both)
    batch = inputs(model)
    rounds = any(type(m).__name__ == "Linear8bitLt" for m in model.modules())
    assert_close(results(model, batch), results(plain, batch), 0.3 if rounds else 2e-3)
    assert not pelt_fast.explain(model).fallbacks


NOTHING_SAVED = QUANTISED[2:3] + QUANTISED[5:]  # layers that save no activation and no plain weight


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("method", ["lora", "mam", "scaled_parallel_adapter"])
def test_every_site_runs_fused_and_explain_says_beside_what(quantise, method, monkeypatch):
    model = pelt_fast.inject(base("llama", quantise), small_method(method)).train()
    monkeypatch.setenv("PELT_FAST_STRICT", "1")  # a fallback would raise
    model(**inputs(model)).loss.backward()
    report = pelt_fast.explain(model)
    beside = [site for site in report.sites if site.op in ("lora", "ffn")]
    assert beside and not report.fallbacks
    for site in beside:
        assert site.plan == "accumulate"
        assert "its weight is quantised" in site.reason


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("method", ["lora", "lora_ffn", "mam"])
@pytest.mark.parametrize("architecture", ["llama", "bart"])
def test_dropout_draws_the_masks_of_the_plain_base(architecture, method, quantise):
    """Of the method and of the model: the same seeds in the same order."""
    model, plain = twins(architecture, quantise, method, dropout=0.2)
    for module in (*model.modules(), *plain.modules()):
        if hasattr(module, "activation_dropout"):
            module.activation_dropout = module.dropout = 0.1
    batch = inputs(model)
    rounds = any(type(m).__name__ == "Linear8bitLt" for m in model.modules())
    assert_close(results(model, batch), results(plain, batch), 0.3 if rounds else 2e-3)


@pytest.mark.parametrize("placement", ["default", "before_dropout"])
@pytest.mark.parametrize("method", ["scaled_parallel_adapter", "learned_scale_parallel_adapter"])
@pytest.mark.parametrize("architecture", ["mbart", "t5, gated", "gemma2"])
def test_every_kind_of_block_runs_fused_between_its_quantised_projections(
    architecture, method, placement
):
    """An adapter that reads the residual stream, gates, a learned scale, an update that the
    model's output dropout drops too."""
    torch.manual_seed(0)
    model = (MODELS | MORE)[architecture](dropout=0.1)
    own(Float8Linear)(model)
    config = small_method(method, dropout=0.1)
    placed = [dataclasses.replace(m, placement=placement) for m in config.modifications]
    model, plain = with_method(model, dataclasses.replace(config, modifications=tuple(placed)))
    batch = inputs(model)
    assert_close(results(model, batch), results(plain, batch), 2e-4)
    assert not pelt_fast.explain(model).fallbacks


def saved(model: nn.Module, batch) -> int:
    known = [*model.parameters(), *model.buffers()]
    return saved_bytes(lambda: model(**batch).logits, known)


@pytest.mark.parametrize("quantise", NOTHING_SAVED)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "lora_ffn", "houlsby", "mam"])
@pytest.mark.parametrize("architecture", ["llama", "bart"])
def test_a_quantised_base_saves_for_backward_what_the_plain_one_saves(
    architecture, method, dropout, quantise
):
    found = []
    for each in (quantise, lambda model: None):
        model = pelt_fast.inject(base(architecture, each), small_method(method, dropout=dropout))
        found.append(saved(model.train(), inputs(model)))
    quantised, plain = found
    if method == "mam":  # the plain block's packed rows end in columns of padding
        sites = [m for m in model.modules() if isinstance(m, ParallelFFNAdapter)]
        rows = inputs(model)["input_ids"].numel()
        padding = sum(-site.down_weight.shape[0] % 16 for site in sites if site.is_packed)
        assert plain - rows * padding * 4 <= quantised <= plain
    else:
        assert quantised == plain


@pytest.mark.parametrize("quantise", QUANTISED)
@pytest.mark.parametrize("method", ["lora", "mam"])
def test_gradient_checkpointing_gives_the_same_gradients(method, quantise):
    model = pelt_fast.inject(base("llama", quantise), small_method(method, dropout=0.2)).train()
    randomise(model)
    batch, found = inputs(model), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        found.append(results(model, batch))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


@pytest.mark.parametrize("quantise", QUANTISED)
def test_bf16_compute_keeps_fp32_gradients_of_the_method(quantise):
    model = base("llama", lambda model: None).to(torch.bfloat16)
    quantise(model)
    pelt_fast.inject(model, small_method("mam")).train()
    out = model(**inputs(model))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    plain = base("llama", lambda model: None).to(torch.bfloat16)
    pelt_fast.inject(plain, small_method("mam")).train()
    reports = [pelt_fast.explain(each).sites for each in (model, plain)]
    for site, same in zip(*reports, strict=True):
        assert site.saved_bytes == same.saved_bytes  # of bf16 activations
    found = gradients(model)
    assert found and all(torch.isfinite(grad).all() for grad in found.values())
    assert {grad.dtype for grad in found.values()} == {torch.float32}


ON_NN_LINEAR = [kind for kind in QUANTISED if "4-bit groups" not in kind.id]  # PEFT knows no other


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("quantise", ON_NN_LINEAR)
def test_accelerate_peft_fuses_lora_beside_quantised_layers(quantise, padding, monkeypatch):
    model = base("llama", quantise)
    kinds = {type(module).__name__ for module in model.modules()}
    model.is_loaded_in_4bit = "Linear4bit" in kinds
    model.is_loaded_in_8bit = "Linear8bitLt" in kinds
    batch = inputs(model, padding=padding)
    config = dict(r=5, lora_alpha=10, init_lora_weights=False, target_modules="all-linear")
    model = get_peft_model(model, LoraConfig(**config)).train()
    # torchao's weights are no memory of their own, that could be left out of the count
    counts = all(type(p.data) is torch.Tensor for p in model.parameters())
    expected, kept = results(model, batch), saved(model, batch) if counts else 0
    model.zero_grad()
    calls, run = [], pelt_fast.functional.lora_beside
    monkeypatch.setattr(
        pelt_fast.functional, "lora_beside", lambda *a, **k: calls.append(1) or run(*a, **k)
    )
    pelt_fast.accelerate_peft(model)
    found = results(model, batch)
    assert len(calls) == 14  # seven linears in each of two layers
    assert_close(found, expected, 2e-5)
    assert not counts or saved(model, batch) <= kept
    pelt_fast.restore_peft(model)
    model.zero_grad()
    assert all(torch.equal(value, expected[name]) for name, value in results(model, batch).items())


def test_pefts_bias_beside_a_quantised_layer_runs_pefts_forward():
    model = base("llama", own(Int8Linear))
    config = LoraConfig(r=5, init_lora_weights=False, target_modules=["q_proj"], lora_bias=True)
    model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))
    model = get_peft_model(model, config)
    with pytest.raises(ValueError, match="its LoRA has a bias, and its base is quantised"):
        pelt_fast.accelerate_peft(model)


def test_a_model_on_quantised_layers_compiles_whole():
    torch._dynamo.reset()
    both = pelt_fast.lora(r=4, dropout=0.0) + pelt_fast.parallel_adapter(r=8, dropout=0.0)
    model = pelt_fast.inject(base("llama", own(Float8Linear)), both)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = inputs(randomise(model).train())
    expected = results(model, batch)
    model.zero_grad()
    out = compiled(**batch)
    out.loss.backward()
    assert_close({"logits": out.logits.detach(), **gradients(model)}, expected, 1e-5)


@pytest.mark.parametrize("method", ["lora", "mam"])
def test_hooks_that_load_offloaded_weights_run_around_the_layers_own_products(method):
    plain = base("llama", own(Float8Linear))
    hooked = dispatch_model(copy.deepcopy(plain), device_map={"": "cpu"}, force_hooks=True)
    batch, found = inputs(plain), []
    for model in (plain, hooked):
        torch.manual_seed(1)
        randomise(pelt_fast.inject(model, small_method(method, dropout=0.2))).train()
        found.append(results(model, batch))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
