"""Projections that share a matrix (Phi-3, ModernBERT, GPT-2) or keep it transposed (GPT-2)."""

import copy
import pickle

import pytest
import torch

import pelt_fast
from pelt_fast import functional
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from pelt_fast.modules.packing import Packing, Packings
from pelt_fast.modules.projection_view import ProjectionView, parameter_of
from tests.models.judge import assert_near, exactly
from tests.small import MORE, inputs, randomise

JOINED = ("gpt2", "phi3", "modernbert")
every_model = pytest.mark.parametrize("architecture", JOINED)


def injected(architecture, method="lora", **changes):
    torch.manual_seed(0)
    model = MORE[architecture](dropout=0.0)
    config = pelt_fast.methods()[method].replace(size=5, **changes)
    return randomise(pelt_fast.inject(model, config))


@every_model
def test_parts_are_the_rows_the_model_splits(architecture):
    model = MORE[architecture](dropout=0.0).eval()
    (stack,) = stacks_of(model)
    layer, slot = find(base_of(model), stack.layers)[0], stack.attentions[0]
    x = torch.randn(2, 3, 32)
    owner = find(layer, slot.q).owner
    split = torch.cat([find(layer, path)(x) for path in (slot.q, slot.k, slot.v)], -1)
    assert_near(split, owner(x), copy.deepcopy(owner).double()(x.double()))
    out = find(layer, slot.out)
    assert out.weight.shape == (32, 32)
    whole = getattr(out, "owner", out)
    assert_near(out(x), whole(x), copy.deepcopy(whole).double()(x.double()))


@every_model
def test_lora_on_parts_is_lora_on_three_linears(architecture):
    """Written out: the owner's output plus each part's own update in its own columns."""
    model = injected(architecture, dropout=0.0).eval()
    (stack,) = stacks_of(model)
    layer, slot = find(base_of(model), stack.layers)[0], stack.attentions[0]
    owner, x = find(layer, slot.q).owner, torch.randn(2, 3, 32)
    wanted = type(owner).forward(owner, x).clone()
    exact = type(owner).forward(copy.deepcopy(owner).double(), x.double())
    parts = [find(layer, path) for path in (slot.q, slot.k, slot.v)]
    carrying = [part for part in parts if "pelt_lora" in part._modules]
    assert [part.name for part in carrying] == ["q", "v"]
    for part in carrying:
        site = part.pelt_lora
        wanted[..., part.rows] += site.scale * x @ site.lora_a.t() @ site.lora_b.t()
        lora_a, lora_b = site.lora_a.double(), site.lora_b.double()
        exact[..., part.rows] += site.scale * x.double() @ lora_a.t() @ lora_b.t()
    assert_near(owner(x), wanted, exact)


@every_model
@pytest.mark.parametrize("method", ["lora", "lora_ffn"])
def test_merge_and_unmerge(architecture, method):
    model = injected(architecture, method).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = inputs(model)
    exact = exactly(model, batch)["logits"]
    with torch.no_grad():
        logits = model(**batch).logits
        with pelt_fast.backend("reference"):
            same = model(**batch).logits
        merged = pelt_fast.merge(model)(**batch).logits
    assert_near(merged, same, exact)
    assert not torch.equal(merged, logits)
    pelt_fast.unmerge(model)
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    whole = pelt_fast.merge(model, keep_base=False)
    assert not any("pelt_" in name for name in whole.state_dict())
    with torch.no_grad():
        assert_near(whole(**batch).logits, merged, exact)


@every_model
def test_save_load_copy_and_pickle(architecture, tmp_path):
    model = injected(architecture, "mam").eval()
    batch = inputs(model)
    logits, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.save(model, tmp_path)
    torch.manual_seed(0)
    loaded = pelt_fast.load(MORE[architecture](dropout=0.0), tmp_path).eval()
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_near(other(**batch).logits, logits, exact)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(model(**batch).logits, logits)  # parts of the copy look into the copy


def test_a_fused_gate_is_packed_once_and_a_transposed_weight_not_at_all():
    sites = {name: injected(name, "scaled_parallel_adapter")._pelt.sites for name in JOINED}
    assert all(site.module.is_packed for site in sites["phi3"] + sites["modernbert"])
    assert not any(site.module.is_packed for site in sites["gpt2"])
    ffn = sites["phi3"][0].module.ffn
    assert parameter_of(ffn.gate_proj.module) is parameter_of(ffn.in_proj.module)
    explanation = pelt_fast.explain(injected("gpt2", "mam").train())
    assert not explanation.fallbacks


def test_lora_of_two_dropouts_on_one_matrix_is_refused():
    q, v = pelt_fast.methods()["lora"].modifications
    config = pelt_fast.PeltConfig("two", (
        pelt_fast.Modification(**{**q.__dict__, "size": 5, "dropout": 0.1}),
        pelt_fast.Modification(**{**v.__dict__, "size": 5, "dropout": 0.2}),
    ))  # fmt: skip
    model = MORE["phi3"]()
    with pytest.raises(ValueError, match=r"qkv_proj:v shares its matrix.*got 0.1 and 0.2"):
        pelt_fast.inject(model, config)
    assert "_pelt" not in model.__dict__
    pelt_fast.inject(MORE["qwen2"](), config)


def test_a_part_moves_with_its_owner():
    part = ProjectionView(torch.nn.Linear(4, 6), "0/2", slice(0, 3))
    part.owner.double()
    assert part.weight.dtype == torch.float64 and part.bias.shape == (3,)
    assert not list(part.parameters())


def test_backward_fills_a_buffer_that_was_made_after_its_forward():
    in_weight, out_weight = (
        torch.nn.Parameter(torch.randn(*shape), requires_grad=False)
        for shape in ((24, 16), (16, 24))
    )
    small = [torch.randn(*shape) for shape in ((4, 16), (4,), (16, 4), (16,))]
    x = torch.randn(5, 16, requires_grad=True)

    def block(packings=None):
        return functional.ffn_parallel_adapter(
            x, in_weight, None, out_weight, None, *small, scale=2.0, packings=packings
        )

    (expected,) = torch.autograd.grad(block().square().sum(), x)
    packings = Packings(Packing(0, 4), Packing(1, 4))
    packings.pack([in_weight], out_weight)
    y = block(packings)
    packings.unpack([in_weight], out_weight)
    packings.pack([in_weight], out_weight)
    (found,) = torch.autograd.grad(y.square().sum(), x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
