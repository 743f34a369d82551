"""T5: a position bias under the prefix, a block whose output dropout is the layer's."""

import pytest
import torch

import pelt_fast
from pelt_fast.presets import methods
from tests.models.judge import assert_near
from tests.models.test_parity import assert_fused_equals_reference
from tests.small import inputs, randomise, t5

MEANINGLESS = {"full", "linear_probe", "bitfit", "prompt"}
METHODS = [name for name in methods() if name not in MEANINGLESS]


def injected(method, **changes):
    torch.manual_seed(0)
    model = t5(dropout=0.0)
    pelt_fast.inject(model, methods()[method].replace(size=5, **changes))
    return randomise(model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_fused_is_the_reference(method, padding, training):
    model = injected(method).train(training)
    assert_fused_equals_reference(model, inputs(model, padding=padding))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_prefix_that_adds_nothing_leaves_mask_and_bias_as_they_were(padding, attention):
    torch.manual_seed(0)
    model = t5(dropout=0.0).eval()
    model.set_attn_implementation(attention)
    batch = inputs(model, padding=padding)
    plain, exact = model(**batch).logits, model.double()(**batch).logits
    model.float()
    pelt_fast.inject(model, methods()["prefix_ungated"].replace(reparameterization="none", size=5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prefix" in name:  # (layers, keys and values, heads, size, head dim)
                parameter.normal_()[:, 1].zero_()
    assert_near(model(**batch).logits, plain, exact)


def test_a_prefix_decodes_with_a_cache_as_without():
    model = injected("mam").eval()
    ids = inputs(model)["input_ids"]
    settings = dict(max_new_tokens=6, do_sample=False, num_beams=2)
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def test_explain_names_every_site_as_fused():
    model = injected("mam").train()
    explanation = pelt_fast.explain(model)
    assert len(explanation.sites) == 10
    assert not explanation.fallbacks


def test_an_attention_that_computes_itself_is_refused(monkeypatch):
    """As T5's does before transformers gave it the interface: a prefix would be ignored."""
    model = t5()
    attention = type(model.encoder.block[0].layer[0].SelfAttention)
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states, **_: (hidden_states,))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=r"T5Attention .* a prefix would be ignored"):
        pelt_fast.inject(model, methods()["mam"].replace(size=5))
    assert model.config._attn_implementation == before
    assert not any("pelt_" in name for name, _ in model.named_parameters())
