"""A prompt in front of a decoder that has no row: found, proved, trained, saved, or refused."""

import pytest
import torch
from torch import nn

import pelt_fast
from benchmarks.architectures import cells, tiny
from pelt_fast.injection.prompt_cache import HeldPrompt
from pelt_fast.injection.prompt_front import Front
from pelt_fast.injection.rounding import is_off
from pelt_fast.injection.synthetic_batch import synthetic_batch
from pelt_fast.layouts.layout import PromptLayout
from pelt_fast.layouts.lookup import base_of
from tests.models.judge import assert_untouched, state
from tests.small import randomise

FAMILIES = tiny.families()
HELD = ["gpt_neox", "olmoe", "cohere", "persimmon", "qwen2_vl", "bamba"]
REFUSED = [
    ("biogpt", "its positions are absolute, and virtual tokens have none"),
    ("bloom", "its forward takes no position_ids"),
    ("gemma4_text", "it does not run on embeddings and positions"),
    ("marian", "in a decoder alone that has no encoder"),
]


def made(kind: str) -> nn.Module:
    return cells.Family(kind, FAMILIES[kind][1]).made()


@pytest.mark.parametrize("kind", HELD)
def test_a_prompt_of_embeddings_is_their_tokens(kind):
    model, length = made(kind).eval(), 4
    base, ids = base_of(model), synthetic_batch(base_of(model))["input_ids"]
    front = ids[:1, :length]
    with torch.no_grad():
        whole = torch.cat([front.expand(len(ids), -1), ids], 1)
        wanted = base(input_ids=whole, use_cache=False)[0][:, length:]
        rows = base.get_input_embeddings()(front)[0]
    before = state(model)
    pelt_fast.inject(model, "prompt", length=length)
    prompt = next(site.module for site in model._pelt.sites)
    with torch.no_grad():
        prompt.embedding.copy_(rows)
        found = base(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    base(input_ids=ids, use_cache=False)[0].square().sum().backward()
    assert prompt.embedding.grad.isfinite().all() and prompt.embedding.grad.abs().max() > 0
    pelt_fast.eject(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind, why", REFUSED)
def test_a_place_that_is_not_there_is_refused_by_its_reason(kind, why):
    model = made(kind)
    before = state(model)
    with pytest.raises(ValueError, match=f"has no prompt in its layout: .*{why}"):
        pelt_fast.inject(model, "prompt")
    assert_untouched(model, before)


def test_explain_prints_the_place():
    explanation = pelt_fast.explain(pelt_fast.inject(made("gpt_neox"), "prompt"))
    assert f"prompt={PromptLayout()!r}" in explanation.layout


def test_generate_takes_the_prompt_as_its_tokens():
    model = made("gpt_neox").eval()
    ids = synthetic_batch(base_of(model))["input_ids"]
    front = ids[:1, :3].expand(2, -1)
    wanted = model.generate(torch.cat([front, ids], 1), max_new_tokens=6, do_sample=False)
    pelt_fast.inject(model, "prompt", length=3)
    with torch.no_grad():
        rows = base_of(model).get_input_embeddings()(ids[0, :3])
        next(site.module for site in model._pelt.sites).embedding.copy_(rows)
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, wanted[:, 3:])


@pytest.mark.parametrize("what", ["positions", "mask", "cache"])
def test_a_prompt_that_is_not_its_tokens_is_refused(what, monkeypatch):
    """Each of the three comparisons sees what breaks it alone."""
    model = made("gpt_neox")
    if what == "mask":
        right = Front.mask_of
        monkeypatch.setattr(
            Front, "mask_of", lambda *a: None if (m := right(*a)) is None else torch.ones_like(m)
        )
    elif what == "cache":
        count = HeldPrompt.whole  # the stack's own positions would leave the prompt out
        monkeypatch.setattr(
            HeldPrompt, "tokens", lambda held, i=0: max(count(held, i) - held.length, 0)
        )
    else:
        monkeypatch.setattr(Front, "in_front", _reversed(Front.in_front))
    before = state(model)
    said = {"positions": "without a mask", "mask": "in a padded batch", "cache": "with a cache"}
    with pytest.raises(ValueError, match=said[what]):
        pelt_fast.inject(model, "prompt", length=4)
    assert_untouched(model, before)


def _reversed(right):
    """The virtual tokens in the wrong order."""

    def in_front(self, x):
        wide = right(self, x)
        length = wide.shape[1] - x.shape[1]
        return torch.cat([wide[:, :length].flip(1), wide[:, length:]], 1)

    return in_front


def test_several_methods_of_a_discovered_model_are_proved_one_by_one():
    model = made("gpt_neox").eval()
    before = state(model)
    with pytest.raises(ValueError, match="no prompt in its layout: its positions are absolute"):
        pelt_fast.inject_named(made("biogpt"), {"a": "prompt", "b": "lora"}, together=True)
    pelt_fast.inject_named(model, {"a": "lora", "b": "prompt"}, together=True)
    pelt_fast.eject(model)
    assert_untouched(model, before)


def test_a_method_that_joins_others_is_proved_in_their_midst(monkeypatch):
    model, batch = made("gpt_neox").eval(), dict(input_ids=torch.arange(3, 12)[None])
    pelt_fast.inject_named(model, {"a": "lora", "b": "mam"}, together=True)
    randomise(model)
    weights, logits = model.state_dict(), model(**batch).logits
    sites = list(model._pelt.sites)
    with monkeypatch.context() as spoiled:
        spoiled.setattr(Front, "in_front", _reversed(Front.in_front))
        with pytest.raises(ValueError, match="it does not act as tokens with its embeddings do"):
            pelt_fast.add_method(model, "c", "prompt")
    assert model.state_dict().keys() == weights.keys() and model._pelt.sites == sites
    assert torch.equal(model(**batch).logits, logits)
    with pytest.raises(ValueError, match="no method is named 'c'; there are a, b"):
        pelt_fast.route(model, "c")
    pelt_fast.add_method(model, "c", "prompt")
    pelt_fast.add_method(model, "d", "houlsby")
    assert torch.equal(model(**batch).logits, logits)
    with pytest.raises(ValueError, match="no prompt in its layout: its positions are absolute"):
        other = pelt_fast.inject_named(made("biogpt"), {"a": "lora"}, together=True)
        pelt_fast.add_method(other, "b", "prompt")
    assert list(pelt_fast.active(other)) == ["a"]


def test_what_rounding_is():
    one = torch.ones(4)
    assert not is_off(one, one + 1e-6) and is_off(one, one + 1e-4)
    assert is_off(one, one * float("nan")) and is_off(one, one[:2])


def test_what_cannot_be_told_from_rounding_is_refused():
    """In 16 bits the tiny model's attention is below the rounding errors."""
    model = made("gpt_neox").bfloat16()
    before = state(model)
    with pytest.raises(ValueError, match="its effect is not larger than rounding errors"):
        pelt_fast.inject(model, "prompt", length=4)
    assert_untouched(model, before)
