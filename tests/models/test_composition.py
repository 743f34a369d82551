"""Models that other libraries have changed: works, or is refused with the reason."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pelt_fast
from tests.models.judge import assert_fused_is_the_reference, assert_near, exactly
from tests.models.test_inject import same, snapshot
from tests.models.test_parity import (
    JUDGED_SIZE,
    assert_close,
    outputs_and_gradients,
    small_method,
)
from tests.small import MODELS, inputs, llama, randomise

METHODS = ["lora", "houlsby", "mam", "scaled_parallel_adapter", "multi_head_parallel_adapter"]


@pytest.fixture
def liger(monkeypatch):
    """Liger's patch of an existing model's MLPs; its change of the class is taken back."""
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "LlamaMLP", modeling_llama.LlamaMLP)
    off = dict(rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=False)
    return functools.partial(monkey_patch.apply_liger_kernel_to_llama, swiglu=True, **off)


@pytest.mark.parametrize("method", ["scaled_parallel_adapter", "mam"])
def test_a_block_liger_patched_runs_beside_and_is_ligers_again_after_eject(
    method, liger, monkeypatch
):
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu")
    # Liger's kernel needs a GPU: what it computes
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", lambda a, b: nn.functional.silu(a) * b)
    plain = llama(dropout=0.0)
    model = copy.deepcopy(plain)
    liger(model=model)
    patched = [layer.mlp.__dict__["forward"] for layer in model.model.layers]
    assert all("Liger" in forward.__qualname__ for forward in patched)
    torch.manual_seed(1)
    randomise(pelt_fast.inject(model, small_method(method, dropout=0.0)))
    torch.manual_seed(1)
    randomise(pelt_fast.inject(plain, small_method(method, dropout=0.0)))
    batch = inputs(model)
    logits, grads = outputs_and_gradients(model.train(), batch)
    expected, wanted = outputs_and_gradients(plain.train(), batch)
    assert_near(logits, expected, exactly(plain, batch)["logits"])
    assert_close(grads, wanted)
    assert all("LigerSwiGLUMLP.forward" in s.reason for s in pelt_fast.explain(model).fallbacks)
    assert len(pelt_fast.explain(model).fallbacks) == len(patched)
    pelt_fast.eject(model)
    assert [layer.mlp.__dict__["forward"] for layer in model.model.layers] == patched


def test_a_linear_layer_whose_forward_was_replaced():
    """It runs as it is, LoRA and adapters beside it."""
    model = MODELS["roberta"]()
    layer, twin = model.roberta.encoder.layer[0], copy.deepcopy(model).double().eval()
    other = twin.roberta.encoder.layer[0]
    for linear in (other.attention.self.query, other.output.dense):
        for parameter in linear.parameters():
            parameter.data *= 2
    for linear in (layer.attention.self.query, layer.output.dense):
        linear.forward = functools.partial(lambda x, own: 2 * own(x), own=linear.forward)
    batch = inputs(model)
    before, exact = model.eval()(**batch).logits, twin(**batch).logits
    for method, name, reason in (
        ("lora", "encoder.layer.0.attention.self.query", "replaced by another library"),
        ("scaled_parallel_adapter", "encoder.layer.0.intermediate.dense", "patched"),
    ):
        pelt_fast.inject(model, small_method(method))
        assert_near(model.eval()(**batch).logits, before, exact)  # starts at the base
        (site,) = pelt_fast.explain(model).fallbacks
        assert site.name == name and reason in site.reason
        pelt_fast.eject(model)
        assert torch.equal(model.eval()(**batch).logits, before)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_a_parametrized_model_is_the_model_of_its_computed_weights(architecture, method):
    plain = MODELS[architecture](dropout=0.0)
    model = copy.deepcopy(plain)
    for twin in (plain, model):
        linears = [m for n, m in twin.base_model.named_modules() if isinstance(m, nn.Linear)]
        for linear in linears[:7]:
            if twin is model:
                parametrize.register_parametrization(linear, "weight", Halved())
            else:
                linear.weight.data /= 2
    results, exact = [], None
    for twin in (plain, model):
        torch.manual_seed(5)
        pelt_fast.inject(twin, small_method(method, dropout=0.0))
        methods = [p for n, p in twin.named_parameters() if "pelt_" in n]
        for i, parameter in enumerate(methods):
            torch.manual_seed(i)
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        torch.manual_seed(6)
        batch = inputs(twin)
        results.append(outputs_and_gradients(twin.train(), batch))
        exact = exactly(twin, batch) if exact is None else exact
    (expected, wanted), (logits, grads) = results
    assert_near(logits, expected, exact["logits"])
    assert_close({n: g for n, g in grads.items() if "pelt_" in n},
                 {n: g for n, g in wanted.items() if "pelt_" in n})  # fmt: skip
    pelt_fast.eject(model)
    assert parametrize.is_parametrized(
        next(m for m in model.modules() if hasattr(m, "parametrizations"))
    )


def test_lora_on_a_computed_weight_is_not_merged():
    model = MODELS["roberta"]()
    query = model.roberta.encoder.layer[0].attention.self.query
    parametrize.register_parametrization(query, "weight", Halved())
    randomise(pelt_fast.inject(model, small_method("lora"))).eval()
    batch = inputs(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.merge(model)
    assert_near(model(**batch).logits, expected, exact)
    plans = {s.name: s.plan for s in pelt_fast.explain(model).sites}
    assert plans["encoder.layer.0.attention.self.query"] != "merged"
    assert plans["encoder.layer.1.attention.self.query"] == "merged"


@pytest.mark.parametrize("method", [*METHODS, "lora_ffn", "bitfit"])
def test_biases_where_llama_has_none_by_default(method):
    model = llama(dropout=0.0, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    before = snapshot(model)
    randomise(pelt_fast.inject(model, small_method(method, JUDGED_SIZE))).train()
    batch = inputs(model, padding="left")
    assert_fused_is_the_reference(model, batch)
    assert same(snapshot(pelt_fast.eject(model)), before)


@pytest.mark.parametrize("method", ["lora", "prompt", "mam", "bitfit"])
def test_tied_embeddings_stay_tied_and_frozen(method):
    model = MODELS["bart"]()
    pelt_fast.inject(model, small_method(method))
    tied = model.model.shared.weight
    assert model.lm_head.weight is tied and not tied.requires_grad
    model(**inputs(model)).loss.backward()
    assert tied.grad is None
    pelt_fast.eject(model)
    assert model.lm_head.weight is model.model.encoder.embed_tokens.weight is tied
