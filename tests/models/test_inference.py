"""Evaluation without gradients: the same numbers, and nothing that only training needs."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pelt_fast
from pelt_fast.ops.common.library import OpFunction
from tests.models.judge import assert_near
from tests.models.test_inject import METHODS
from tests.models.test_parity import injected
from tests.small import inputs, pairs


class Calls(TorchDispatchMode):
    """Names of our ops that ran, and what each kept for a backward (elements of its other outputs)."""

    def __init__(self):
        super().__init__()
        self.kept: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function.namespace == "pelt_fast":
            name = function._schema.name.removeprefix("pelt_fast::")
            self.kept[name] = self.kept.get(name, 0) + sum(t.numel() for t in result[1:])
        return result


@pytest.mark.parametrize("architecture, method", pairs(METHODS))
def test_inference_runs_nothing_that_only_training_needs(architecture, method, monkeypatch):
    model = injected(architecture, method).eval()
    batch = inputs(model, padding="left")
    expected = model(**batch).logits
    for kind in OpFunction.__subclasses__():
        monkeypatch.setattr(kind, "apply", lambda *arguments: pytest.fail("autograd ran"))
    state = torch.get_rng_state()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), Calls() as calls:
            logits = model(**batch).logits
        assert torch.equal(logits, expected) and not logits.requires_grad
        assert not any(name.endswith("_bwd") for name in calls.kept)
        assert calls.kept.get("ffn_fwd", 0) == calls.kept.get("adapter_fwd", 0) == 0
    assert torch.equal(torch.get_rng_state(), state)  # no seed was drawn


@pytest.mark.parametrize("method", ["lora", "houlsby", "mam", "multi_head_parallel_adapter"])
def test_one_token_with_a_cache_goes_through_the_same_ops(method):
    model = injected("llama", method).eval()
    ids = inputs(model, batch=4)["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :-1], use_cache=True)
        past = cache.get("cache", cache.get("past_key_values"))
        name = "cache" if "cache" in cache else "past_key_values"
        with Calls() as calls:
            last = model(ids[:, -1:], **{name: past}).logits
        exact = copy.deepcopy(model).double()(ids).logits
    assert_near(last[:, 0], whole[:, -1], exact[:, -1])
    assert calls.kept and pelt_fast.explain(model).fallbacks == []
