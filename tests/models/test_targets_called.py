"""LoRA by name: layers that are called, or read by another, in a plain and a compiled model."""

import copy

import pytest
import torch
from torch import nn

import pelt_fast
from tests.models.by_name import sites_of
from tests.small import inputs, llama, randomise


class Reader(nn.Module):
    """Calls one of its layers, and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def test_a_layer_that_never_runs_is_said_once(caplog):
    model = pelt_fast.inject(Reader(), "lora", targets="all-linear", r=2)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        caplog.clear()
        each(torch.randn(2, 8))
        assert "1 of the layers by name did not run in the first forward: read." in caplog.text
        caplog.clear()
        each(torch.randn(2, 8))
        assert caplog.text == ""
        hooks = [module for module in each.modules() if module._forward_hooks]
        assert hooks == []
        pelt_fast.eject(each)
    pelt_fast.inject(llama(), "lora", targets="all-linear", r=2)(**inputs(llama()))
    assert caplog.text == ""
    model = pelt_fast.eject(pelt_fast.inject(Reader(), "lora", targets=["read"], r=2))
    assert all(not module._forward_hooks for module in model.modules())


def test_a_layer_that_torch_reads_itself_is_no_target(caplog):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 4))
    for name in ("linear1", "self_attn.out_proj"):
        with pytest.raises(ValueError, match="around it reads its weight without calling it"):
            pelt_fast.inject(model, "lora", targets=[name])
    assert sites_of(pelt_fast.inject(model, "lora", targets="all-linear", r=2)).keys() == {"1"}
    assert "no LoRA on 0.linear2: the TransformerEncoderLayer around it" in caplog.text


def test_a_compiled_model_by_name():
    torch._dynamo.reset()
    model = randomise(pelt_fast.inject(Reader(), "lora", targets=["called"], r=2, dropout=0))
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(x), model(x))


def test_a_sequential_runs_its_own_children_alone():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x, children = torch.randn(3, 8), len(net)
    before = net(x)
    pelt_fast.inject(net, pelt_fast.lora(r=2, targets="all-linear"))
    assert torch.equal(net.eval()(x), before) and len(net) == children
    pelt_fast.eject(net.to(torch.float64).float())
    assert torch.equal(net(x), before)
