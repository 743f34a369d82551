"""What a site runs is decided once: everything it rests on is noticed when it changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pelt_fast
from pelt_fast.modules import LoRALinear, ParallelFFNAdapter
from pelt_fast.modules.decision import DecidesOnce
from tests.models.judge import assert_near, exactly
from tests.models.test_parity import small_method
from tests.small import inputs, llama, randomise, roberta

METHODS = {"mam": ParallelFFNAdapter, "lora": LoRALinear}


def built(method, make=llama):
    torch.manual_seed(0)
    return randomise(pelt_fast.inject(make(dropout=0.0), small_method(method, dropout=0.0)))


def sites(model, kind=DecidesOnce):
    return [module for module in model.modules() if isinstance(module, kind)]


def frozen_linear(site):
    """A linear layer whose weight the site's op reads."""
    return site.ffn.in_proj.module if isinstance(site, ParallelFFNAdapter) else site.frozen.module


def plans(model):
    return [site.plan for site in pelt_fast.explain(model).sites]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_taken_at_inject_and_held(method):
    model = built(method)
    held = [site.decision() for site in sites(model)]
    assert held and all(decision.given is not None for decision in held)
    for training in (True, False):
        model.train(training)(**inputs(model))
    assert all(a is b for a, b in zip(held, (site.decision() for site in sites(model))))


def patch(site):
    """Another library's forward on a projection (Liger, Unsloth)."""
    linear = frozen_linear(site)
    before = type(linear).forward

    def forward(x):
        return before(linear, x)

    linear.forward = forward


def hook(site):
    frozen_linear(site).register_forward_hook(lambda module, args, y: 2 * y)


def unfreeze(site):
    frozen_linear(site).weight.requires_grad_()


def replace_class(site):
    """A quantised layer, an nn.Linear that multiplies by something else."""

    class Quantised(nn.Linear):
        def forward(self, x):
            return super().forward(x).mul(1.5)

    frozen_linear(site).__class__ = Quantised


def cast(site):
    frozen_linear(site).double()


def wrap_weight(site):
    """A weight that is numbers only to its own library (torchao, bitsandbytes)."""

    class Packed(nn.Parameter):
        pass

    linear = frozen_linear(site)
    linear.weight = Packed(linear.weight.detach().clone(), requires_grad=False)


def change_activation(site):
    site.ffn.block.module.act_fn = nn.Tanh()


FFN_CHANGES = [patch, hook, unfreeze, replace_class, cast, wrap_weight, change_activation]


@pytest.mark.parametrize("change", FFN_CHANGES, ids=lambda change: change.__name__)
def test_a_widened_ffn_notices(change):
    model = built("mam")
    (first, *others) = sites(model, ParallelFFNAdapter)
    before = first.decision()
    change(first)
    assert first.decision() is not before
    assert all(site.decision().runs_op for site in others)
    if change is change_activation:
        assert first.decision().given[1] == "tanh"
    else:
        assert not first.decision().runs_op and first.decision().reason


def test_a_widened_ffn_runs_what_was_put_there():
    """The numbers are those of a fresh model with the same change."""
    for change in (hook, replace_class, change_activation):
        model = built("mam").eval()
        model(**inputs(model))
        change(sites(model, ParallelFFNAdapter)[0])
        fresh = copy.deepcopy(model)  # it takes its own decisions
        batch = inputs(model)
        exact = exactly(fresh, batch)["logits"]
        assert_near(model(**batch).logits, fresh(**batch).logits, exact)


@pytest.mark.parametrize("change", [replace_class, wrap_weight], ids=lambda c: c.__name__)
def test_a_lora_notices(change):
    model = built("lora")
    (first, *others) = sites(model, LoRALinear)
    assert first.decision().runs_op
    change(first)
    assert not first.decision().runs_op
    assert all(site.decision().runs_op for site in others)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("move", [
    lambda model: model.double(), lambda model: model.to(torch.bfloat16), lambda model: model.float(),
], ids=["double", "bfloat16", "float"])  # fmt: skip
def test_a_move_is_noticed(method, move):
    model = built(method).eval()
    batch = inputs(model)
    logits = model(**batch).logits
    move(model)
    moved = model(**batch).logits
    dtype = next(model.parameters()).dtype
    assert moved.dtype == dtype and all(site.decision().dtype == dtype for site in sites(model))
    assert torch.allclose(moved.float(), logits, atol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_the_backend_of_the_thread_is_noticed(method):
    model = built(method)
    ours = plans(model)
    with pelt_fast.backend("reference"):
        assert set(plans(model)) == {"reference"} != set(ours)
        assert all(site.decision().given is None for site in sites(model))
    assert plans(model) == ours


def test_strict_is_read_at_each_fallback(monkeypatch):
    model = built("mam")
    hook(sites(model, ParallelFFNAdapter)[0])
    model(**inputs(model))
    monkeypatch.setenv("PELT_FAST_STRICT", "1")
    with pytest.raises(RuntimeError, match="PELT_FAST_STRICT"):
        model(**inputs(model))


@pytest.mark.parametrize("p, runs", [(0.3, True), (1.0, False)])
def test_a_dropout_is_read_at_each_forward(p, runs):
    model = built("mam", roberta).train()
    (site, *_) = sites(model, ParallelFFNAdapter)
    site.output_dropout.at.value.p = p
    assert site.decision().runs_op is runs
    site.output_dropout.at.value.p = 0.0
    assert site.decision().runs_op


def test_a_class_that_is_patched_is_noticed(monkeypatch):
    model = built("mam")
    site = sites(model, ParallelFFNAdapter)[0]
    kind = type(site.ffn.block.module)
    own = kind.forward
    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", lambda self, x: 2 * own(self, x))
        assert "class was replaced" in site.decision().reason
    assert site.decision().runs_op


@pytest.mark.parametrize("method", METHODS)
def test_copies_take_their_own(method):
    model = built(method)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(site._held is None for site in sites(twin))
        batch = inputs(model)
        assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)
        for site in sites(twin):
            weights = frozen_linear(site).weight
            given = site.decision().given[0]
            assert weights is (given.in_weight if isinstance(site, ParallelFFNAdapter) else given)
