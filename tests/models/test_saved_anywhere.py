"""Packed weights are tensors like others to what saves by storage: accelerate, safetensors, torch,
transformers, shared memory."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
from safetensors.torch import load_file, load_model, save_model

import pelt_fast
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, randomise

PACKED = ["llama", "bart", "roberta", "phi3"]  # gated, columns, under an output dropout, fused gate
METHOD = "scaled_parallel_adapter"


def built(architecture: str, seed: int = 0):
    torch.manual_seed(seed)
    model = {**MORE, **MODELS}[architecture](dropout=0.1)
    return randomise(pelt_fast.inject(model, small_method(METHOD))).eval()


def sites(model) -> list:
    return [site.module for site in model._pelt.sites]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    torch.manual_seed(1)
    return model(**inputs(model)).logits


def is_same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal to what a product of differently aligned memory rounds."""
    return torch.allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.fixture(params=PACKED)
def model(request):
    found = built(request.param)
    assert all(site.is_packed for site in sites(found))
    return found


def fresh(model):
    """The same architecture with other weights."""
    name = next(n for n in PACKED if n == model.config.model_type)
    return built(name, seed=1)


def test_every_weight_has_a_storage_of_its_own_and_memory_is_not_doubled(model):
    storages, buffers = {}, 0
    for name, tensor in model.state_dict().items():
        key = tensor.untyped_storage().data_ptr()
        assert storages.setdefault(key, tensor.data_ptr()) == tensor.data_ptr(), name
    for site in sites(model):
        for packing in (site.packings.stacked, site.packings.out):
            if packing is None:
                continue
            held = sum(p.untyped_storage().nbytes() for p in packing.own)
            assert held == sum(p.numel() * p.element_size() for p in packing.own)
            room = packing.buffer.untyped_storage().nbytes() - held
            assert 0 <= room <= (packing.room + 16) * packing.buffer.shape[1] * 4
            buffers += 1
    assert buffers


def test_accelerate_and_safetensors_give_the_weights_back(model, tmp_path):
    wanted, kept = logits(model), copy.deepcopy(model.state_dict())
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.save_model(model, tmp_path / "model")
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    saved = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert set(model.state_dict()) - saved <= tied | {"lm_head.weight"}
    save_model(model, str(tmp_path / "whole.safetensors"))
    other = fresh(model)
    assert not torch.equal(logits(other), wanted)
    load_model(other, str(tmp_path / "whole.safetensors"))
    assert is_same(logits(other), wanted) and all(site.is_packed for site in sites(other))
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(0.5)
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(t, kept[name]) for name, t in prepared.state_dict().items())
    assert is_same(logits(prepared), wanted)


def test_transformers_saves_a_base_that_loads(model, tmp_path):
    wanted = logits(model)
    pelt_fast.save(model, tmp_path / "method")
    model.save_pretrained(tmp_path / "whole")
    base = type(model).from_pretrained(tmp_path / "whole")
    pelt_fast.load(base, tmp_path / "method")
    assert is_same(logits(base.eval()), wanted)


def test_torch_saves_no_more_than_there_is(model):
    file = io.BytesIO()
    own = {p: p.detach() for site in sites(model) for p in site.packings.stacked.own}
    torch.save(list(own.values()), file)
    assert file.tell() < sum(t.numel() * t.element_size() for t in own) + 1024 * (1 + len(own))


@pytest.mark.parametrize("again", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float(),
    lambda m: m.to("cpu", torch.float32),
], ids=["deepcopy", "pickle", "cast", "to"])  # fmt: skip
def test_copies_and_moves_pack_again_and_are_the_same(model, again):
    wanted = logits(model)
    found = again(model)
    assert is_same(logits(found), wanted)
    assert all(site.is_packed for site in sites(found))


def test_shared_memory_stays_shared(model):
    wanted = logits(model)
    model.share_memory()
    assert is_same(logits(model), wanted)
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert not any(site.is_packed for site in sites(model))


def test_a_tensor_put_there_for_one_call_is_not_moved():
    """functional_call's own frozen weights: parameters of another model are left where they are."""
    model, other = built("llama"), built("llama", seed=1)
    batch = inputs(model)
    with torch.no_grad():
        wanted = other(**batch).logits
        theirs = dict(pelt_fast.eject(copy.deepcopy(other)).named_parameters())
        weights = {**theirs, **{n: p for n, p in other.named_parameters() if "pelt_" in n}}
        places = {name: tensor.data_ptr() for name, tensor in weights.items()}
        for site in sites(model):
            site.packings.forget(*site._frozen)  # as after a move
        found = torch.func.functional_call(model, weights, (), batch).logits
    assert {name: tensor.data_ptr() for name, tensor in weights.items()} == places
    assert is_same(found, wanted)
    assert is_same(logits(model), logits(copy.deepcopy(model)))


def test_weights_that_somebody_else_points_elsewhere_stay_there():
    model = built("llama")
    weight = sites(model)[0].ffn.in_proj.module.weight
    theirs = 2 * weight.detach()
    weight.data = theirs
    found = logits(model)
    assert weight.data_ptr() == theirs.data_ptr()
    assert is_same(found, logits(model))
    twin = copy.deepcopy(model)
    assert is_same(found, logits(twin))
