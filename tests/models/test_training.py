"""Training machinery: checkpointing, the prefix MLP, convergence, autocast, accumulation."""

import pytest
import torch

import pelt_fast
from pelt_fast.modules import PrefixBank
from tests.models.test_parity import (
    assert_close,
    injected,
    outputs_and_gradients,
    small_method,
)
from tests.small import MODELS, gradients, inputs, randomise


@pytest.mark.parametrize("method", ["lora", "houlsby", "mam"])
@pytest.mark.parametrize("architecture", MODELS)
def test_gradient_checkpointing_changes_no_gradient_with_dropout_on(architecture, method):
    """PEFT refuses prefix here, jxhe/unify drops it silently."""
    model = injected(architecture, method).train()
    batch = inputs(model, padding="right")
    _, expected = outputs_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    _, actual = outputs_and_gradients(model, batch)
    assert_close(actual, expected, 1e-6)
    if method == "mam":
        assert all(g.abs().sum() > 0 for n, g in actual.items() if "prefix" in n)


@pytest.mark.parametrize("method", ["lora", "houlsby", "mam", "prefix", "prefix_nomlp"])
@pytest.mark.parametrize("architecture", MODELS)
def test_reentrant_checkpointing_changes_no_gradient_with_dropout_on(architecture, method):
    model = injected(architecture, method).train()
    model.enable_input_require_grads()
    batch = inputs(model, padding="right")
    _, expected = outputs_and_gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for _ in range(2):
        _, actual = outputs_and_gradients(model, batch)
        assert_close(actual, expected, 1e-6)
    model.gradient_checkpointing_disable()
    assert_close(outputs_and_gradients(model, batch)[1], expected, 1e-6)


@pytest.mark.parametrize("architecture", MODELS)
def test_prefix_mlp_runs_once_a_forward_and_never_per_batch_row(architecture, monkeypatch):
    model = injected(architecture, "prefix").train()
    shapes = []
    run = PrefixBank.forward

    def counting(bank):
        shapes.append(tuple(bank.embedding.shape))
        return run(bank)

    monkeypatch.setattr(PrefixBank, "forward", counting)
    banks = sum(isinstance(module, PrefixBank) for module in model.modules())
    model(**inputs(model, batch=7)).loss.backward()
    assert shapes == [(5, 32)] * banks
    assert banks == (3 if architecture in ("bart", "mbart") else 1)
    model.gradient_checkpointing_enable()
    model(**inputs(model)).loss.backward()
    assert len(shapes) == 2 * banks


@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_prefix_is_cached_over_decoding_and_refreshed_by_a_change(architecture, monkeypatch):
    model = injected(architecture, "prefix").eval()
    calls = []
    run = PrefixBank.forward
    monkeypatch.setattr(PrefixBank, "forward", lambda bank: calls.append(1) or run(bank))
    banks = [module for module in model.modules() if isinstance(module, PrefixBank)]
    ids = inputs(model)["input_ids"]
    model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(calls) == len(banks)
    with torch.no_grad():
        before = model(ids).logits
        banks[0].embedding.add_(1.0)
        assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", ["lora", "houlsby", "mam"])
@pytest.mark.parametrize("architecture", MODELS)
def test_twenty_steps_of_fused_and_reference_training_agree(architecture, method):
    curves = []
    for backend in ("auto", "reference"):
        with pelt_fast.backend(backend):
            torch.manual_seed(0)
            model = injected(architecture, method).train()
            trainable = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trainable, lr=3e-3)
            batch, curve = inputs(model, padding="right"), []
            for _ in range(20):
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert torch.allclose(*curves, rtol=2e-3)
    assert curves[0][-5:].mean() < curves[0][:5].mean()


@pytest.mark.parametrize("architecture", MODELS)
def test_autocast_follows_the_frozen_layers_dtype(architecture):
    model = injected(architecture, "mam", 0.0).train()
    batch = inputs(model, padding="right")
    expected, grads = outputs_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        logits, actual = outputs_and_gradients(model, batch)
    assert (logits.float() - expected).abs().max() < 0.15 * expected.abs().max()
    for name, grad in actual.items():
        assert grad.dtype == torch.float32 and torch.isfinite(grad).all(), name
        cosine = torch.cosine_similarity(grad.flatten(), grads[name].flatten(), 0)
        assert cosine > 0.9 or grads[name].norm() < 1e-4, name


def test_gradients_accumulate_over_two_forwards_before_one_backward():
    model = injected("bart", small_method("mam", dropout=0.0), 0.0).train()
    first, second = inputs(model), inputs(model)
    expected = {}
    for batch in (first, second):
        for name, grad in outputs_and_gradients(model, batch)[1].items():
            expected[name] = expected.get(name, 0) + grad
    model.zero_grad()
    (model(**first).loss + model(**second).loss).backward()
    assert_close(gradients(model), expected)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("method", ["lora", "mam"])
@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_a_compiled_model_gives_the_eager_gradients(architecture, method):
    torch._dynamo.reset()
    model = injected(architecture, small_method(method, dropout=0.0), dropout=0.0).train()
    batch = inputs(model)
    logits, expected = outputs_and_gradients(model, batch)
    model.zero_grad()
    out = torch.compile(model)(**batch)
    out.loss.backward()
    assert torch.allclose(out.logits, logits, atol=1e-4)
    assert_close(gradients(model), expected, 1e-3)


def test_output_attentions_with_eager_leaves_the_gates_share_out():
    model = MODELS["llama"]()
    model.set_attn_implementation("eager")
    randomise(pelt_fast.inject(model, small_method("prefix")), 0.5).eval()
    batch = inputs(model)
    out = model(batch["input_ids"], output_attentions=True)
    weights = out.attentions[0]
    assert weights.shape == (3, 4, 9, 9)
    assert torch.all(weights.sum(-1) < 1) and torch.all(weights.sum(-1) > 0)


@pytest.mark.parametrize("method", ["prefix", "prefix_nomlp"])
def test_a_forward_in_training_without_autograd_is_no_reentrant_checkpoint(method):
    model = injected("llama", small_method(method, dropout=0.0), dropout=0.0).train()
    batch = inputs(model)
    logits = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
