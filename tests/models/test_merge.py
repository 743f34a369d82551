"""merge and unmerge: the same function, the base again bit for bit, refusals."""

import copy

import pytest
import torch

import pelt_fast
from pelt_fast import Modification, PeltConfig
from tests.models.judge import assert_near, exactly
from tests.models.test_generate import tokens
from tests.models.test_inject import same, snapshot
from tests.models.test_parity import injected, small_method
from tests.small import MODELS, inputs, randomise

LINEAR = ["lora", "lora_ffn", "prefix_lora_ffn"]


def activation_of(architecture):
    return "silu" if architecture == "llama" else "gelu"


def base_snapshot(model):
    return {n: v.clone() for n, v in model.state_dict().items() if "pelt_" not in n}


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("architecture", MODELS)
def test_merged_is_the_same_function_and_unmerge_the_same_bits(architecture, method):
    model = injected(architecture, method).eval()
    batch, before = inputs(model, padding="left"), base_snapshot(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    assert pelt_fast.merge(model) is model
    assert_near(model(**batch).logits, expected, exact)
    assert not same(base_snapshot(model), before)
    plans = {site.plan for site in pelt_fast.explain(model).sites if site.op == "lora"}
    assert plans == {"merged"}
    assert pelt_fast.unmerge(model) is model
    assert same(base_snapshot(model), before)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("architecture", ["bart", "mbart", "llama"])
def test_merged_generates_the_same_tokens(architecture):
    model = injected(architecture, "lora", scale=0.3).eval()
    batch = inputs(model)
    expected = tokens(model, batch)
    assert torch.equal(tokens(pelt_fast.merge(model), batch), expected)


def test_a_merge_into_bf16_is_rounded_once():
    model = pelt_fast.inject(MODELS["llama"]().bfloat16(), small_method("lora"))
    randomise(model)
    linear = model.model.layers[0].self_attn.q_proj
    site, weight = linear.pelt_lora, linear.weight.detach().clone()
    pelt_fast.merge(model)
    exact = weight.double() + site.scale * site.lora_b.double() @ site.lora_a.double()
    assert torch.equal(linear.weight, exact.float().bfloat16())


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("architecture", ["bart", "bert", "roberta"])
def test_an_ffn_adapter_of_the_blocks_activation_becomes_a_wider_block(architecture, learned):
    composition = "learned_channel_scale" if learned else "scaled"
    adapter = Modification("bottleneck", "ffn", "parallel", composition, 5, 2.0, "gelu")
    model = randomise(pelt_fast.inject(MODELS[architecture](), PeltConfig("x", (adapter,)))).eval()
    batch, before = inputs(model, padding="right"), base_snapshot(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    with pytest.raises(ValueError, match="folded on request"):
        pelt_fast.merge(model)
    pelt_fast.merge(model, widen_ffn=True)
    assert_near(model(**batch).logits, expected, exact)
    assert any(v.shape != before[n].shape for n, v in base_snapshot(model).items())
    pelt_fast.unmerge(model)
    assert same(base_snapshot(model), before)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("architecture", MODELS)
def test_an_adapter_without_activation_folds_into_its_projection(architecture, residual):
    adapter = Modification("bottleneck", "attention", "sequential", "scaled", 5, 0.5, "identity",
                           residual=residual)  # fmt: skip
    model = randomise(pelt_fast.inject(MODELS[architecture](), PeltConfig("x", (adapter,)))).eval()
    batch, before = inputs(model), base_snapshot(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.merge(model)
    assert_near(model(**batch).logits, expected, exact)
    pelt_fast.unmerge(model)
    assert same(base_snapshot(model), before)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("architecture", MODELS)
def test_without_a_copy_the_model_is_a_plain_one_again(architecture, tmp_path):
    model = injected(architecture, "lora").eval()
    attributes = {n for n, _ in MODELS[architecture]().named_parameters()}
    batch = inputs(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.merge(model, keep_base=False)
    assert {n for n, _ in model.named_parameters()} == attributes and not hasattr(model, "_pelt")
    assert_near(model(**batch).logits, expected, exact)
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path).eval()
    assert_near(twin(**batch).logits, expected, exact)


def test_what_is_left_of_a_merge_without_a_copy_cannot_be_unmerged():
    model = injected("bart", "prefix_lora_ffn").eval()
    pelt_fast.merge(model, keep_base=False)
    with pytest.raises(ValueError, match="merged already"):
        pelt_fast.merge(model)
    for call in (pelt_fast.unmerge, pelt_fast.eject):
        with pytest.raises(ValueError, match="no copy of the base is left"):
            call(model)


def test_eject_after_merge_gives_the_base_back():
    base = MODELS["bart"]()
    model = pelt_fast.inject(copy.deepcopy(base), small_method("lora"))
    pelt_fast.merge(randomise(model))
    assert same(snapshot(pelt_fast.eject(model)), snapshot(base))


def test_a_merged_model_neither_trains_nor_saves(tmp_path):
    model = pelt_fast.merge(injected("roberta", "lora"))
    with pytest.raises(RuntimeError, match="merged: its method cannot train"):
        model.train()(**inputs(model))
    with pytest.raises(ValueError, match="unmerge it before save"):
        pelt_fast.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing is injected"):
        pelt_fast.merge(MODELS["bart"]())
    with pytest.raises(ValueError, match="is not merged"):
        pelt_fast.unmerge(pelt_fast.unmerge(model))


@pytest.mark.parametrize(
    "architecture, method, reason",
    [
        ("bart", "prefix", "prefix on this place is not linear"),
        ("bart", "houlsby", "an activation or a LayerNorm is not linear"),
        ("bart", "scaled_parallel_adapter", "activation is gelu, the adapter's relu"),
        ("llama", "scaled_parallel_adapter", "a gated block multiplies"),
    ],
)
def test_what_is_not_linear_is_refused_with_the_reason(architecture, method, reason):
    model = injected(architecture, method)
    before = base_snapshot(model)
    with pytest.raises(ValueError, match=reason):
        pelt_fast.merge(model, widen_ffn=True)
    assert same(base_snapshot(model), before)
