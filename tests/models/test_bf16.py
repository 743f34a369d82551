"""A bf16 base: every preset by the budget, fp32 factors, gradients that are not rounded."""

import copy
import dataclasses

import pytest
import torch

import pelt_fast
from pelt_fast.testing import compare
from tests.models.test_parity import (
    METHODS,
    PADDINGS,
    outputs_and_gradients,
    small_method,
)
from tests.small import MODELS, inputs, pairs, randomise


def without_kinks(config):
    """No dropout, and GELU for ReLU: a unit that two roundings put on either side of 0 is a
    difference of its whole gradient."""
    modifications = [
        dataclasses.replace(
            m, dropout=0.0, activation="relu" if m.target == "heads" else "gelu"
        ) if m.form in ("bottleneck", "low_rank") else m
        for m in config.modifications
    ]  # fmt: skip
    return dataclasses.replace(config, modifications=tuple(modifications))


@pytest.mark.parametrize("architecture, method", pairs(METHODS))
def test_fused_bf16_is_as_near_to_fp64_as_the_reference(architecture, method):
    """Output and every gradient: at most twice the reference's own error, and a rounding band."""
    model = MODELS[architecture](dropout=0.0).bfloat16()
    config = without_kinks(small_method(method))
    randomise(pelt_fast.inject(model, config), 0.1)
    exact = copy.deepcopy(model).double()
    for padding in PADDINGS:
        batch = inputs(model, padding=padding)
        results = []
        for twin, name in ((model, "auto"), (model, "reference"), (exact, "reference")):
            with pelt_fast.backend(name):
                logits, grads = outputs_and_gradients(twin.train(), batch)
            # of a single number the two errors are two draws: a learned scale's gradient is the sum
            # of its up_weight's, which is judged
            grads = {n: g for n, g in grads.items() if g.numel() > 1}
            results.append({"logits": logits, **grads})
        verdict = compare(*results, torch.bfloat16)
        assert verdict.ok, verdict
        with torch.no_grad():  # in evaluation the same function
            logits = model.eval()(**batch).logits
        verdict = compare({"logits": logits}, *({"logits": r["logits"]} for r in results[1:]),
                          torch.bfloat16)  # fmt: skip
        assert verdict.ok, verdict


@pytest.mark.parametrize("method", ["lora", "houlsby", "mam"])
@pytest.mark.parametrize("architecture", MODELS)
def test_bf16_base_trains_fp32_factors(architecture, method):
    model = MODELS[architecture]().bfloat16()
    pelt_fast.inject(model, small_method(method))
    method_tensors = {n: p for n, p in model.named_parameters() if "pelt_" in n}
    assert all(p.dtype == torch.float32 for p in method_tensors.values())
    randomise(model.train())
    # tokens enough that no sum over them is a bf16 number by chance
    _, grads = outputs_and_gradients(model, inputs(model, batch=8, padding="right"))
    for name in method_tensors:
        assert torch.isfinite(grads[name]).all()
        assert not torch.equal(grads[name], grads[name].bfloat16().float()), name
