"""Layers that repack their weight in evaluation, as bitsandbytes' nf4 does on a CPU with bf16
instructions: a model that was evaluated trains with the gradients of one that was not."""

import copy

import pytest
import torch
from torch.nn import functional as F

import pelt_fast
from benchmarks.architectures import tiny
from pelt_fast.integrations.packed_rows import why_not_packed
from tests.models.test_parity import assert_close, small_method
from tests.models.test_quantised import Int8Linear, base, bitsandbytes, needs, own
from tests.small import gradients, inputs, randomise

FAMILIES = tiny.families()


class RepackingLinear(Int8Linear):
    """Repacks its weight in evaluation; the product with that form has no gradient of x."""

    def __init__(self, linear):
        super().__init__(linear)
        self.support_avx512bf16_for_cpu, self.packed = True, False

    def forward(self, x):
        if self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad:
            self._repack(True)
        if not self.packed:
            return super().forward(x)
        rows = self.weight.t().to(x.dtype) * self.row_scale.to(x.dtype)
        return F.linear(x.detach(), rows, self.bias)

    def _repack(self, packed: bool) -> None:
        if packed != self.packed:
            self.weight.data, self.packed = self.weight.data.t().contiguous(), packed

    def _save_to_state_dict(self, *args):
        self._repack(False)
        super()._save_to_state_dict(*args)


KINDS = [
    pytest.param(own(RepackingLinear), id="int8 rows"),
    pytest.param(bitsandbytes("nf4"), id="bitsandbytes nf4", marks=needs("bitsandbytes")),
]


def llama(quantise):
    return base("llama", quantise)


def without_a_row(quantise):
    torch.manual_seed(0)
    wide = dict(hidden_size=64, intermediate_size=128)
    model = tiny.model("stablelm", FAMILIES["stablelm"][1], **wide)
    quantise(model)
    return model


def weights_of(model) -> list[torch.Tensor]:
    """The packed numbers as they lie now."""
    return [p.data.clone() for p in model.parameters() if not p.is_floating_point()]


def trained(model, batch) -> dict:
    torch.manual_seed(2)
    model.train()(**batch).loss.backward()
    return gradients(model)


def with_method(model, method: str):
    torch.manual_seed(1)
    return randomise(pelt_fast.inject(model, small_method(method, dropout=0.0)))


@pytest.mark.parametrize("quantise", KINDS)
@pytest.mark.parametrize("make", [llama, without_a_row])
@pytest.mark.parametrize("method", ["lora", "mam"])
def test_an_evaluated_model_trains_as_one_that_was_not(make, method, quantise):
    fresh = make(quantise)
    model, batch, first = copy.deepcopy(fresh), inputs(fresh), weights_of(fresh)
    assert first
    for each in (fresh, model):
        with_method(each, method)
    with torch.no_grad():
        model.eval()(**batch)
    why_not_packed(model)
    wanted, found = trained(fresh, batch), trained(model, batch)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
    pelt_fast.eject(model)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), first, strict=True))


@pytest.mark.parametrize("quantise", KINDS)
def test_a_base_that_was_evaluated_before_has_its_gradients_again(quantise):
    """bitsandbytes has rounded its scales to bf16 then."""
    fresh = llama(quantise)
    model, batch = copy.deepcopy(fresh), inputs(fresh)
    with torch.no_grad():
        model.eval()(**batch)
    wanted, found = (trained(with_method(each, "mam"), batch) for each in (fresh, model))
    assert_close(found, wanted, 2e-2)


@pytest.mark.parametrize("quantise", KINDS[:1])
def test_after_eject_the_layers_do_as_they_did(quantise):
    model = llama(quantise)
    batch, before = inputs(model), weights_of(model)
    pelt_fast.eject(pelt_fast.inject(model, "lora"))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))
    with torch.no_grad():
        model.eval()(**batch)
    packed = [layer.packed for layer in model.modules() if isinstance(layer, RepackingLinear)]
    assert packed and all(packed)
