"""Activations and forwards of a base's blocks are those that are there when they run."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

import pelt_fast
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from pelt_fast.modules.activation import name_of
from tests.models.formula import assert_is_the_formula
from tests.models.judge import assert_near
from tests.models.test_inject import refused
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs

ALL = {**MODELS, **MORE}
BLOCKS = ["bart", "mbart", "bert", "llama", "gpt2", "opt", "t5", "t5, gated", "phi3", "modernbert",
          "vit"]  # fmt: skip
SPELLED_OUT = ["bart", "mbart", "bert", "opt", "whisper"]
CONTAINERS = ["llama", "gpt2", "t5", "phi3", "modernbert", "vit"]


def base(architecture):
    torch.manual_seed(0)
    return ALL[architecture](dropout=0.0).eval()


def method(name):
    """Wide enough that no gradient is a handful of numbers: how far those round is chance, in plain
    torch as in ours."""
    return small_method(name, dropout=0.0).replace(size=24)


def batch_of(model):
    """Rows long enough that few gradients cancel."""
    return inputs(model, length=25)


@torch.no_grad()
def randomise(model, scale=0.2):
    """Give the method's tensors values of their own; a task head stays the base's."""
    for name, parameter in model.named_parameters():
        if "pelt_" in name:
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def layers_and_ffns(model):
    """Each layer with the table's slot of its block."""
    for stack in stacks_of(model):
        for layer in find(base_of(model), stack.layers):
            yield layer, stack.ffn


def put(layer, path, value):
    """Write an attribute, as a user would; a function in the place of a module wants it gone."""
    parent, _, name = path.rpartition(".")
    owner = find(layer, parent)
    if not isinstance(value, nn.Module) and isinstance(getattr(owner, name), nn.Module):
        delattr(owner, name)
    setattr(owner, name, value)


def activate_by(model, make):
    for layer, slot in layers_and_ffns(model):
        put(layer, slot.activation, make())
    return model


def assert_starts_at(plain, model, batch):
    """A zero update leaves the base's outputs within the budget."""
    exact = copy.deepcopy(plain).double()
    wide = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    assert_near(model(**batch).logits, plain(**batch).logits, exact(**wide).logits)


@pytest.mark.parametrize("activation, name", [
    *((ACT2FN[key], name) for key, name in {
        "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "relu": "relu",
        "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "silu": "silu",
        "swish": "silu", "tanh": "tanh", "linear": "identity", "quick_gelu": None, "relu2": None,
        "gelu_10": None, "gelu_fast": None, "mish": None, "leaky_relu": None, "relu6": None,
    }.items()),
    (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh"), (nn.Identity(), "identity"),
    (F.gelu, "gelu"), (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    (functools.partial(F.leaky_relu, negative_slope=0.3), None), (torch.relu, "relu"),
    (F.relu, "relu"), (F.silu, "silu"), (torch.tanh, "tanh"), (torch.sigmoid, None),
    (lambda x: x.relu(), None), (None, None),
])  # fmt: skip
def test_an_activation_is_named_only_where_it_computes_that(activation, name):
    assert name_of(activation) == name
    if name is not None:
        x = torch.linspace(-4, 4, 99, dtype=torch.float64)
        from pelt_fast.ops.common.activations import activate

        assert torch.allclose(activation(x), activate(name, x), atol=1e-12)


def test_an_activation_somebody_changed_has_no_name():
    class Mine(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    patched, hooked, held = nn.ReLU(), nn.SiLU(), ACT2FN["gelu"]
    patched.forward = lambda x: 2 * torch.relu(x)
    hooked.register_forward_hook(lambda module, args, y: 2 * y)
    held.act = F.silu
    assert [name_of(each) for each in (Mine(), patched, hooked, held)] == [None] * 4


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("architecture", BLOCKS)
@pytest.mark.parametrize(
    "make", [nn.Tanh, lambda: torch.sigmoid], ids=["known", "unknown function"]
)
def test_an_activation_replaced_before_or_after_inject(architecture, when, make):
    model = base(architecture)
    changed = activate_by(copy.deepcopy(model), make)
    if when == "before":
        model = copy.deepcopy(changed)
    pelt_fast.inject(model, method("scaled_parallel_adapter"))
    if when == "after":
        activate_by(model, make)
    batch = batch_of(model)
    assert_starts_at(changed, model, batch)
    assert_is_the_formula(changed, randomise(model), batch)
    reasons = {site.reason for site in pelt_fast.explain(model).sites}
    named = name_of(make()) is not None
    assert all(("know its activation" in reason) != named for reason in reasons)
    pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, changed(**batch).logits)


def test_a_shared_activation_is_replaced_in_one_layer():
    model = base("bart")
    shared = nn.ReLU()
    activate_by(model, lambda: shared)
    changed = copy.deepcopy(model)
    pelt_fast.inject(model, method("scaled_parallel_adapter"))
    for twin in (changed, model):
        for stack in (twin.model.encoder, twin.model.decoder):
            stack.layers[1].activation_fn = nn.Mish()
    batch = batch_of(model)
    assert_is_the_formula(changed, randomise(model), batch)
    pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, changed(**batch).logits)


def with_a_subclass(model, monkeypatch):
    for layer, slot in layers_and_ffns(model):
        block = find(layer, slot.entry)
        block.__class__ = type("Half", (type(block),), {"forward": halved(type(block).forward)})


def with_a_patched_class(model, monkeypatch):
    kind = type(find(*next((layer, slot.entry) for layer, slot in layers_and_ffns(model))))
    monkeypatch.setattr(kind, "forward", halved(kind.forward))


def with_a_patched_module(model, monkeypatch):
    for layer, slot in layers_and_ffns(model):
        block = find(layer, slot.entry)
        block.forward = functools.partial(halved(type(block).forward), block)


def halved(forward):
    @functools.wraps(forward)
    def half(self, x):
        return 0.5 * forward(self, x)

    return half


@pytest.mark.parametrize("change", [with_a_subclass, with_a_patched_class, with_a_patched_module])
@pytest.mark.parametrize("name", ["scaled_parallel_adapter", "houlsby"])
@pytest.mark.parametrize("architecture", CONTAINERS)
def test_a_block_with_a_forward_of_its_own_runs_beside(architecture, name, change, monkeypatch):
    changed = base(architecture)
    change(changed, monkeypatch)
    if change is with_a_patched_module:  # a copy's forward is bound to the copied block's twin
        model = base(architecture)
        change(model, monkeypatch)
    else:
        model = copy.deepcopy(changed)
    model.load_state_dict(changed.state_dict())
    pelt_fast.inject(model, method(name))
    batch = batch_of(model)
    if name != "houlsby":
        assert_starts_at(changed, model, batch)
        ffns = [site for site in pelt_fast.explain(model).sites if site.op == "ffn"]
        assert all(site.fell_back and "forward" in site.reason for site in ffns)
    randomise(model)
    assert_is_the_formula(changed, model, batch)
    pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, changed(**batch).logits)


def test_a_class_patched_after_inject(monkeypatch):
    model = base("llama")
    changed = copy.deepcopy(model)
    pelt_fast.inject(model, method("scaled_parallel_adapter"))
    with_a_patched_class(changed, monkeypatch)
    assert_is_the_formula(changed, randomise(model), batch_of(model))


@pytest.mark.parametrize("name", ["scaled_parallel_adapter", "houlsby", "mam"])
@pytest.mark.parametrize("architecture", SPELLED_OUT)
def test_a_layer_that_spells_its_block_out_must_be_known(architecture, name, monkeypatch):
    model = base(architecture)
    for layer, _ in layers_and_ffns(model):
        kind = type(layer)
        layer.__class__ = type("Mine", (kind,), {"forward": lambda self, x, *a, **k: (x,)})
    refused(model, small_method(name), ValueError, r"Mine is not a class of the model's own file")
    pelt_fast.inject(model, small_method("lora"))  # needs nothing of the layer


def test_a_piece_of_a_spelled_out_block_must_be_known(monkeypatch):
    model = base("bert")
    monkeypatch.setattr(type(model.bert.encoder.layer[0].output), "forward", lambda self, x, y: x)
    refused(model, small_method("mam"), ValueError, r"layer\.0\.output: the forward of the class")


def test_nothing_goes_before_the_dropout_of_a_block_that_is_not_known(monkeypatch):
    model = base("gpt2")
    with_a_subclass(model, monkeypatch)
    config = small_method("scaled_parallel_adapter", placement="before_dropout")
    refused(model, config, ValueError, "nothing can be put before its dropout")
