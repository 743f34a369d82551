"""Projections that do more than their weight, or in another dtype: the update is added beside."""

import copy
import functools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pelt_fast
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from tests.models.formula import assert_is_the_formula
from tests.models.judge import assert_near
from tests.models.test_bf16 import without_kinks
from tests.models.test_inject import refused
from tests.models.test_parity import small_method
from tests.models.test_read_late import (
    activate_by,
    assert_starts_at,
    base,
    batch_of,
    layers_and_ffns,
    method,
    randomise,
)
from tests.small import inputs

SITELESS = ("full", "linear_probe", "bitfit")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv1D(Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(linear):
    linear.__class__ = DoubledConv1D if isinstance(linear, Conv1D) else Doubled


def patched(linear):
    linear.forward = functools.partial(lambda own, x: 2 * type(own).forward(own, x), linear)


def hooked(linear):
    linear.register_forward_hook(Twice())


class Twice:
    def __call__(self, module, args, y):
        return 2 * y


def projections(model):
    wanted = {}
    for stack in stacks_of(model):
        for layer in find(base_of(model), stack.layers):
            own, ffn = stack.attentions[0], stack.ffn
            for path in (own.q, own.out, ffn.in_proj, ffn.out_proj):
                found = find(layer, path.partition(":")[0])
                wanted[found] = found
    return list(wanted)


@pytest.mark.parametrize("change", [subclass, patched, hooked])
@pytest.mark.parametrize("name", ["lora", "lora_ffn", "houlsby", "scaled_parallel_adapter"])
@pytest.mark.parametrize("architecture", ["bart", "gpt2", "phi3"])
def test_a_projection_that_does_more_than_its_weight(architecture, name, change):
    spelled = architecture == "bart" and name in ("houlsby", "scaled_parallel_adapter")
    model, changed = base(architecture), base(architecture)
    for twin in (model, changed):
        for linear in projections(twin):
            change(linear)
    if change is hooked and spelled:
        refused(model, method(name), ValueError, r"fc1 carries a hook")
        return
    pelt_fast.inject(model, method(name))
    batch = batch_of(model)
    if name != "houlsby":
        assert_starts_at(changed, model, batch)
    randomise(model)
    if change is not hooked or name == "scaled_parallel_adapter":
        assert_is_the_formula(changed, model, batch)
    found = pelt_fast.explain(model)
    if name == "scaled_parallel_adapter" or (change is not hooked and name != "houlsby"):
        assert found.fallbacks
    pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, changed(**batch).logits)


@pytest.mark.parametrize("change", [subclass, patched])
def test_a_layer_that_does_more_is_not_merged(change):
    model = base("llama")
    change(model.model.layers[0].self_attn.q_proj)
    randomise(pelt_fast.inject(model, method("lora")))
    batch = batch_of(model)
    logits, exact = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    pelt_fast.merge(model)
    assert_near(model(**batch).logits, logits, exact)
    plans = [site.plan for site in pelt_fast.explain(model).sites]
    assert plans == ["own layer + update", "merged", "merged", "merged"]


@pytest.mark.parametrize("name", ["lora", "lora_ffn", "houlsby", "parallel_adapter_attn",
                                  "multi_head_parallel_adapter", "prefix"])  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
def test_a_model_that_peft_has_wrapped(architecture, name):
    """Every preset runs on it, and one of no update leaves it as it is."""
    peft = pytest.importorskip("peft")
    model = base(architecture)
    names = {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "phi3": ["qkv_proj", "gate_up_proj"],
        "bert": ["query", "dense"],
    }.get(architecture, ["q_proj", "o_proj", "down_proj"])
    settings = peft.LoraConfig(r=3, target_modules=names, init_lora_weights=False,
                               fan_in_fan_out=architecture == "gpt2")  # fmt: skip
    peft.inject_adapter_in_model(settings, model)
    changed = copy.deepcopy(model)
    zeroed(pelt_fast.inject(model, method(name)))
    batch = batch_of(model)
    if name != "prefix":
        assert_starts_at(changed, model, batch)
    if name in ("lora", "lora_ffn", "houlsby"):
        assert_is_the_formula(changed, randomise(model), batch)
    pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, changed(**batch).logits)


@torch.no_grad()
def zeroed(model):
    """The method with an update of zero."""
    for key, parameter in model.named_parameters():
        if "pelt_" in key and key.rpartition(".")[2] in ("up_weight", "up_bias"):
            parameter.zero_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora", "lora_ffn", "houlsby", "scaled_parallel_adapter"])
@pytest.mark.parametrize("architecture", ["t5", "t5, gated"])
def test_t5_in_half_precision_keeps_wo_in_float32(architecture, name, dtype):
    # a ReLU of the base has kinks: half precision falls on either side
    model = activate_by(base(architecture), nn.GELU).to(dtype)
    for layer, slot in layers_and_ffns(model):
        find(layer, slot.out_proj).float()
    changed = copy.deepcopy(model).requires_grad_(False)  # torch's CPU GEMMs ask for it
    pelt_fast.inject(model, without_kinks(method(name)))
    batch = batch_of(model)
    if name != "houlsby":
        assert torch.equal(model(**batch).logits, changed(**batch).logits)
    # the gradients by fp16: of a small tensor in bf16 two roundings are two draws
    gradients = dtype == torch.float16
    assert_is_the_formula(changed, randomise(model, 0.1), batch, gradients)


@pytest.mark.parametrize("name", [n for n in pelt_fast.methods() if n not in SITELESS])
def test_every_preset_runs_on_t5_with_wo_in_float32(name):
    model = base("t5").half()
    for layer, slot in layers_and_ffns(model):
        find(layer, slot.out_proj).float()
    config = pelt_fast.PeltConfig(name, small_method(name).modifications, dtype="float16")
    pelt_fast.inject(model, config).train()
    loss = model(**inputs(model)).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", ["lora_ffn", "scaled_parallel_adapter", "houlsby"])
def test_one_projection_in_another_dtype_under_autocast(name):
    model = base("llama").bfloat16()
    for layer in model.model.layers:
        layer.mlp.down_proj.float()
    changed = copy.deepcopy(model)
    pelt_fast.inject(model, without_kinks(method(name)))
    batch = batch_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        if name != "houlsby":
            assert torch.equal(model(**batch).logits, changed(**batch).logits)
        assert_is_the_formula(changed, randomise(model, 0.1), batch)
