"""accelerate's hooks and a method, in every order: the same numbers, and the base comes back."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoModelForCausalLM

import pelt_fast
import pelt_fast.formats.checkpoint
from tests.models.judge import assert_near
from tests.models.test_parity import small_method
from tests.small import MEANINGLESS, MODELS, inputs, randomise

CPU = torch.device("cpu")
ARCHITECTURES = ["llama", "bart", "bert"]
METHODS = [name for name in pelt_fast.methods() if name not in ("linear_probe", "full")]
PAIRS = [(a, m) for a in ARCHITECTURES for m in METHODS if (a, m) not in MEANINGLESS]


def _dispatched(model, folder):
    """A device map, of one device."""
    names = {name: "cpu" for name, child in model.named_children()}
    own = {name: "cpu" for name, _ in model.named_buffers(recurse=False)}
    dispatch_model(model, names | own, main_device="cpu", force_hooks=True)


def _on_cpu(model, folder):
    cpu_offload(model, CPU)


def _on_disk(model, folder):
    disk_offload(model, str(folder), CPU)


HOOKS = [_dispatched, _on_cpu, _on_disk]
# every kind of hook on Llama, one on each of the others
KINDS = dict(llama=HOOKS, bart=HOOKS[1:2], bert=HOOKS[2:])


def built(architecture):
    torch.manual_seed(0)
    return MODELS[architecture](dropout=0.0).eval()


def injected(model, method):
    torch.manual_seed(1)
    return randomise(pelt_fast.inject(model, small_method(method, dropout=0.0))).eval()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@torch.no_grad()
def exact(model, batch):
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with pelt_fast.backend("reference"):
        return copy.deepcopy(model).double()(**wide).logits


@torch.no_grad()
@pytest.mark.parametrize("architecture, method, hooks", [
    (architecture, method, hooks) for architecture, method in PAIRS for hooks in KINDS[architecture]
])  # fmt: skip
def test_hooks_before_and_after_inject_change_no_number(architecture, method, hooks, tmp_path):
    undisturbed = injected(built(architecture), method)
    batch = inputs(undisturbed, padding="right")
    expected, judge = undisturbed(**batch).logits, exact(undisturbed, batch)
    hooks(undisturbed, tmp_path / "after")
    assert_near(undisturbed(**batch).logits, expected, judge)
    model = built(architecture)
    base, plain = snapshot(model), model(**batch).logits
    hooks(model, tmp_path / "before")
    pelt_fast.inject(model, small_method(method, dropout=0.0)).eval()
    own = {n: p for n, p in model.named_parameters() if "pelt_" in n}
    assert all(not p.is_meta for p in own.values())
    remade = injected(built(architecture), method)
    if method == "bitfit":
        return  # what it trains is the base's own, which is away
    pelt_fast.formats.checkpoint.copy_tensors(
        model, {n: p for n, p in remade.named_parameters() if n in own}
    )
    for name, parameter in remade.named_parameters():
        if name in base:
            parameter.copy_(base[name])  # a head is as it was
    assert_near(model(**batch).logits, remade(**batch).logits, exact(remade, batch))
    pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, plain)
    remove_hook_from_submodules(model)
    assert same(model, base) and torch.equal(model(**batch).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("order", ["iher", "ihre", "hier", "hire"])
@pytest.mark.parametrize("hooks", HOOKS[:2])
@pytest.mark.parametrize("architecture, method", [
    (a, m) for a, m in PAIRS if m in ("lora", "mam", "houlsby", "prompt") and a != "bart"
])  # fmt: skip
def test_each_order_of_taking_off_gives_the_base_back(architecture, method, hooks, order, tmp_path):
    """i inject, h hooks on, e eject, r hooks off."""
    model = built(architecture)
    batch, base = inputs(model), snapshot(model)
    plain = model(**batch).logits
    steps = dict(
        i=lambda: pelt_fast.inject(model, small_method(method)),
        h=lambda: hooks(model, tmp_path), e=lambda: pelt_fast.eject(model),
        r=lambda: remove_hook_from_submodules(model),
    )  # fmt: skip
    for step in order:
        steps[step]()
        if step in "ih" and "pelt" in str(model.state_dict().keys()):
            randomise_in_place(model)
            assert not torch.equal(model.eval()(**batch).logits, plain)
        else:
            assert torch.equal(model.eval()(**batch).logits, plain) or step == "r"
    assert same(model, base) and torch.equal(model(**batch).logits, plain)
    assert not any("pelt" in name for m in model.modules() for name in m.__dict__)
    injected(model, method)  # and again
    assert not torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def randomise_in_place(model):
    own = {n: p for n, p in model.named_parameters() if "pelt_" in n}
    values = {n: torch.randn(p.shape) * 0.2 for n, p in own.items()}
    pelt_fast.formats.checkpoint.copy_tensors(model, values)


@torch.no_grad()
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_of_a_hooked_model(architecture, hooks, tmp_path):
    undisturbed = injected(built(architecture), "mam")
    batch = inputs(undisturbed)
    exact = copy.deepcopy(undisturbed).double()(**batch).logits
    hooks(undisturbed, tmp_path / "first")
    expected = undisturbed(**batch).logits
    pelt_fast.save(undisturbed, tmp_path / "method")
    model = built(architecture)
    hooks(model, tmp_path / "second")
    if hooks is _on_disk and architecture == "bert":
        with pytest.raises(ValueError, match="offloaded to disk and cannot be written"):
            pelt_fast.load(model, tmp_path / "method")  # its head
        return
    pelt_fast.load(model, tmp_path / "method").eval()
    assert_near(model(**batch).logits, expected, exact)


@torch.no_grad()
@pytest.mark.parametrize("hooks", HOOKS[:2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_several_methods_of_a_hooked_model(architecture, hooks, tmp_path):
    def several(model):
        torch.manual_seed(1)
        methods = dict(a=small_method("lora", dropout=0.0), b=small_method("mam", dropout=0.0))
        return pelt_fast.inject_named(model, methods)

    model, peer = built(architecture), several(built(architecture))
    base, batch = snapshot(model), inputs(model)
    several(model)
    for name in "ab":
        for one in (model, peer):
            pelt_fast.set_active(one, name)
            torch.manual_seed(2)
            randomise(one)
    hooks(model, tmp_path)
    for weights in ("a", "b", dict(a=0.5, b=1.0)):
        for one in (model, peer):
            pelt_fast.set_active(one, weights).eval()
        exact = copy.deepcopy(peer).double()(**batch).logits
        assert_near(model(**batch).logits, peer(**batch).logits, exact)
    pelt_fast.eject(model)
    remove_hook_from_submodules(model)
    assert same(model, base)


@torch.no_grad()
def test_merge_of_a_hooked_model(tmp_path):
    model = built("llama")
    base, batch = snapshot(model), inputs(model)
    injected(model, "lora")
    exact = copy.deepcopy(model).double()(**batch).logits
    _dispatched(model, tmp_path)
    expected = model(**batch).logits
    pelt_fast.merge(model)
    assert_near(model(**batch).logits, expected, exact)
    pelt_fast.eject(model)
    remove_hook_from_submodules(model)
    assert same(model, base)
    injected(model, "lora")
    cpu_offload(model, CPU)
    with pytest.raises(ValueError, match=r"offloaded weight .take accelerate's hooks off first"):
        pelt_fast.merge(model)
    remove_hook_from_submodules(model)
    pelt_fast.merge(model)
    cpu_offload(model, CPU)
    for call in (pelt_fast.unmerge, pelt_fast.eject):
        with pytest.raises(ValueError, match=r"offloaded since.*remove_hook_from_submodules"):
            call(model)
    remove_hook_from_submodules(model)
    pelt_fast.eject(model)
    assert same(model, base)


@pytest.mark.parametrize("method", ["lora", "mam", "houlsby", "lora_ffn"])
def test_a_method_on_an_offloaded_base_trains(method):
    """The sites of an inject after the hooks are on their device: gradients as without hooks."""
    found = []
    for offloaded, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        model = built("llama")
        if offloaded:
            cpu_offload(model, CPU)
        torch.manual_seed(1)
        randomise(pelt_fast.inject(model, small_method(method, dropout=0.0))).train()
        model = model if offloaded else model.to(dtype)
        model(**inputs(model)).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name in found[0]:
        assert_near(*(gradients[name] for gradients in found))


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "mam", "houlsby", "prompt", "prefix"])
def test_from_pretrained_with_a_device_map_and_a_folder(method, tmp_path):
    base = built("llama")
    base.save_pretrained(tmp_path / "base")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map={**places, "model.layers.1": "disk"},
        offload_folder=tmp_path / "folder",
    ).eval()  # fmt: skip
    assert any(p.is_meta for p in model.parameters())
    batch = inputs(base)
    plain = model(**batch).logits
    injected(model, method), injected(base, method)
    assert all(not p.is_meta for p in model.parameters() if p.requires_grad)
    assert_near(model(**batch).logits, base(**batch).logits, exact(base, batch))
    tokens = batch["input_ids"][:, :4]
    settings = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(tokens, **settings), base.generate(tokens, **settings))
    pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, plain)
