"""accelerate_peft against PEFT itself: outputs, gradients, switches, and PEFT again after restore."""

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model

import pelt_fast
from pelt_fast.integrations.peft_lora import FusedLoRA
from tests.models.judge import assert_near
from tests.small import MODELS, PAD, gradients, inputs, llama, randomise

TARGETS = {"bert": ["query", "value", "dense"], "roberta": ["query", "value", "dense"]}


def lora(architecture, dtype=torch.float32, **changes):
    config = dict(r=5, lora_alpha=10, init_lora_weights=False, lora_dropout=0.0)
    config["target_modules"] = TARGETS.get(architecture, "all-linear")
    model = MODELS[architecture](dropout=0.0).to(dtype)
    return get_peft_model(model, LoraConfig(**(config | changes)))


def prefix(**changes):
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4, **changes)
    return randomise(get_peft_model(llama(dropout=0.0), config), 0.5)


def results(model, batch):
    model.zero_grad()
    torch.manual_seed(4)
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), gradients(model)


def assert_same(actual, expected, tolerance=2e-5):
    logits, grads = actual
    wanted, wanted_grads = expected
    assert torch.allclose(logits, wanted, atol=tolerance)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        assert (grads[name] - grad).abs().max() <= 10 * tolerance * (grad.abs().max() + 0.01), name


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, dict(use_rslora=True), dict(bias="all"), dict(bias="lora_only"),
        dict(lora_bias=True, target_modules=["q_proj", "v_proj", "query", "value"]),
    ],
    ids=["plain", "rslora", "bias all", "bias lora_only", "lora_bias"],
)  # fmt: skip
@pytest.mark.parametrize("architecture", MODELS)
def test_lora_gives_pefts_outputs_and_gradients(architecture, changes, padding):
    model = lora(architecture, **changes).train()
    batch = inputs(model.get_base_model(), padding=padding)
    expected = results(model, batch)
    assert pelt_fast.accelerate_peft(model) is model
    fused = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedLoRA)]
    assert len(fused) >= 4 and not any(m.forward.why_not() for m in fused)
    assert_same(results(model, batch), expected)
    assert pelt_fast.restore_peft(model) is model
    again = results(model, batch)
    assert torch.equal(again[0], expected[0])
    assert all(torch.equal(again[1][name], grad) for name, grad in expected[1].items())


def test_lora_runs_our_function_and_not_pefts(monkeypatch):
    model, calls = lora("llama").train(), []
    run = pelt_fast.functional.lora_linear
    monkeypatch.setattr(
        pelt_fast.functional, "lora_linear", lambda *a, **k: calls.append(1) or run(*a, **k)
    )
    pelt_fast.accelerate_peft(model)(**inputs(model.get_base_model()))
    assert len(calls) == 14  # seven linears in each of two layers


def test_fp32_factors_on_a_bf16_base():
    model = lora("llama", torch.bfloat16).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = inputs(model.get_base_model())
    wanted, grads = results(model, batch)
    logits, found = results(pelt_fast.accelerate_peft(model), batch)
    assert (logits - wanted).abs().max() < 0.02 * wanted.abs().max()
    for name, grad in grads.items():
        assert found[name].dtype == torch.float32
        assert torch.cosine_similarity(found[name].flatten(), grad.flatten(), 0) > 0.99, name


def test_dropout_has_pefts_distribution_and_a_mask_of_its_own_in_every_module():
    model = lora("llama", lora_dropout=0.5, target_modules=["q_proj", "v_proj"]).train()
    pelt_fast.accelerate_peft(model)
    layers = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), FusedLoRA)]
    masks = []
    for layer in layers:
        layer.base_layer.weight.data.zero_()
        layer.lora_A["default"].weight.data.copy_(torch.eye(32)[:5])
        layer.lora_B["default"].weight.data.copy_(torch.eye(layer.out_features, 5))
        y = layer(torch.ones(4000, 32))[:, :5] / layer.scaling["default"]
        assert set(y.unique().tolist()) == {0.0, 2.0} and abs(y.mean().item() - 1) < 0.05
        masks.append(y)
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(layers[0].eval()(torch.ones(2, 32)), layers[0](torch.ones(2, 32)))


def test_pefts_switches_still_work():
    model, plain = lora("roberta"), None
    batch = inputs(model.get_base_model())
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        exact = copy.deepcopy(model).double()(**batch).logits
        with model.disable_adapter():
            plain = model(**batch).logits
        pelt_fast.accelerate_peft(model)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, plain)
        model.merge_adapter()
        assert_near(model(**batch).logits, expected, exact)
        model.unmerge_adapter()
        assert_near(model(**batch).logits, expected, exact)
        merged = copy.deepcopy(pelt_fast.restore_peft(model)).merge_and_unload()
        assert_near(merged(**batch).logits, expected, exact)


def test_what_is_not_plain_lora_runs_pefts_forward():
    model = lora("llama").eval()
    model.add_adapter("second", LoraConfig(r=3, init_lora_weights=False, target_modules=["q_proj"]))
    batch = inputs(model.get_base_model())
    model.base_model.set_adapter(["default", "second"])
    expected = model(**batch).logits
    exact = copy.deepcopy(model).double()(**batch).logits
    pelt_fast.accelerate_peft(model)
    assert_near(model(**batch).logits, expected, exact)
    query = model.get_base_model().model.layers[0].self_attn.q_proj
    assert query.forward.why_not() == "2 adapters are active"
    dora = lora("llama", use_dora=True)
    with pytest.raises(ValueError, match="nothing to accelerate: DoraLinearVariant is not plain"):
        pelt_fast.accelerate_peft(dora)


def test_a_saved_adapter_is_pefts(tmp_path):
    from peft import PeftModel

    base = llama(dropout=0.0)
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=3, init_lora_weights=False, target_modules=["q_proj"]),
    )
    batch = inputs(base)
    logits = pelt_fast.accelerate_peft(model).eval()(**batch).logits
    model.save_pretrained(tmp_path)
    twin = PeftModel.from_pretrained(base, tmp_path).eval()
    wanted = twin(**batch).logits
    assert_near(logits, wanted, twin.double()(**batch).logits)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("choice", ["sdpa", "eager"])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_gives_pefts_outputs_and_gradients(projection, choice, padding):
    model = prefix(prefix_projection=projection, encoder_hidden_size=24).train()
    model.get_base_model().set_attn_implementation(choice)
    batch = inputs(model.get_base_model(), padding=padding)
    wanted, grads = results(model, batch)
    exact, _ = results(copy.deepcopy(model).double(), batch)
    logits, found = results(pelt_fast.accelerate_peft(model), batch)
    rows = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    assert_near(logits[rows], wanted[rows], exact[rows])
    if padding is None:  # the loss counts the padded positions too, whose outputs mean nothing
        assert_same((logits, found), (wanted, grads))
    again = results(pelt_fast.restore_peft(model), batch)
    assert torch.equal(again[0], wanted)


def greedy(model, ids, count):
    """Decoding by the model's forward alone."""
    for _ in range(count):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


@torch.no_grad()
def test_prefix_generates_what_pefts_forward_decodes():
    """Its forward: PEFT 0.21's own generate loses the prefix on transformers 5.24 (docs/facts.md)."""
    model = prefix().eval()
    ids = inputs(model.get_base_model(), batch=2, length=5)["input_ids"]
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=PAD)
    expected = greedy(model, ids, 6)
    pelt_fast.accelerate_peft(model)
    for use_cache in (True, False):
        found = model.generate(input_ids=ids, use_cache=use_cache, **options)
        assert torch.equal(found, expected)


def test_prefix_trains_under_checkpointing():
    model = pelt_fast.accelerate_peft(prefix())
    batch = inputs(model.get_base_model())
    wanted = results(model.train(), batch)
    model.get_base_model().gradient_checkpointing_enable()  # PEFT refuses to train a prefix here
    assert_same(results(model, batch), wanted)


def test_a_disabled_prefix_does_not_act():
    model = prefix().eval()
    batch = inputs(model.get_base_model())
    with model.disable_adapter():
        plain = model(**batch).logits
        pelt_fast.accelerate_peft(model)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, plain)
    assert (model(**batch).logits - plain).abs().max() > 1e-3


def test_what_cannot_be_accelerated_is_refused():
    with pytest.raises(TypeError, match=r"takes a peft\.PeftModel, got LlamaForCausalLM"):
        pelt_fast.accelerate_peft(llama())
    model = pelt_fast.accelerate_peft(lora("bert"))
    with pytest.raises(ValueError, match="accelerated already"):
        pelt_fast.accelerate_peft(model)
    with pytest.raises(ValueError, match="was not accelerated"):
        pelt_fast.restore_peft(pelt_fast.restore_peft(model))
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4)
    encoder = get_peft_model(MODELS["bert"](), config)
    with pytest.raises(ValueError, match="BertForSequenceClassification is not accelerated"):
        pelt_fast.accelerate_peft(encoder)
