"""A method is one method on every handle: wrappers, outer and inner models, shared configs."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

import pelt_fast
from pelt_fast.formats.checkpoint import WEIGHTS_FILE
from pelt_fast.formats.training_state import load_trained, save_trained
from tests.models.judge import assert_near
from tests.models.test_inject import METHODS, same, snapshot
from tests.models.test_parity import small_method
from tests.small import MODELS, bert, inputs, llama, randomise

WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}
ACTIONS = {
    "inject": lambda model, folder: pelt_fast.inject(model, "lora"),
    "inject_named": lambda model, folder: pelt_fast.inject_named(model, {"a": "lora"}),
    "load": lambda model, folder: pelt_fast.load(model, folder),
    "eject": lambda model, folder: pelt_fast.eject(model),
    "save": lambda model, folder: pelt_fast.save(model, folder / "again"),
    "save_trained": lambda model, folder: save_trained(model, folder / "again"),
    "load_trained": lambda model, folder: load_trained(model, folder),
    "merge": lambda model, folder: pelt_fast.merge(model),
    "unmerge": lambda model, folder: pelt_fast.unmerge(model),
    "explain": lambda model, folder: pelt_fast.explain(model),
    "count": lambda model, folder: pelt_fast.count_parameters(model),
    "set_active": lambda model, folder: pelt_fast.set_active(model, "a"),
    "active": lambda model, folder: pelt_fast.active(model),
    "push_to_hub": lambda model, folder: pelt_fast.push_to_hub(model, "a/b", api=object()),
    "export_peft": lambda model, folder: pelt_fast.export_peft(model, folder / "peft"),
    "export_adapterhub": lambda model, folder: pelt_fast.export_adapterhub(model, folder / "hub"),
}


@pytest.fixture
def inside():
    """A method injected into the base inside a model."""
    model = llama()
    pelt_fast.inject(model.model, small_method("lora"))
    return model


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_stands_for_the_model_in_it(wrapper, tmp_path):
    model = llama().eval()
    before, handle = snapshot(model), WRAPPERS[wrapper](model)
    assert pelt_fast.inject(handle, small_method("lora")) is handle
    randomise(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    pelt_fast.save(handle, tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert set(file.keys()) == names
    twin = llama()
    twin.load_state_dict(before)
    pelt_fast.load(WRAPPERS[wrapper](twin), tmp_path)
    assert same(snapshot(twin), snapshot(model))
    assert pelt_fast.count_parameters(handle) == pelt_fast.count_parameters(model)
    assert str(pelt_fast.explain(handle)) == str(pelt_fast.explain(model))
    for each in (handle, model):
        with pytest.raises(ValueError, match="already carries 'lora': eject it first"):
            pelt_fast.inject(each, small_method("prefix"))
    assert pelt_fast.unmerge(pelt_fast.merge(handle)) is handle
    assert pelt_fast.eject(handle) is handle
    assert same(snapshot(model), before)


@pytest.mark.quick(every=5)
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_sees_what_is_injected_and_ejected(method):
    if method == "bitfit":
        pytest.skip("Llama has no biases")
    torch._dynamo.reset()
    model = llama().eval()
    compiled, batch = torch.compile(model, backend="eager"), inputs(model)
    with torch.no_grad():
        plain = compiled(**batch).logits
        base = copy.deepcopy(model).double()(**batch).logits
        randomise(pelt_fast.inject(compiled, small_method(method))).eval()
        expected = model(**batch).logits
        assert (expected - plain).abs().max() > 1e-4
        exact = copy.deepcopy(model).double()(**batch).logits
        assert_near(compiled(**batch).logits, expected, exact)
        pelt_fast.eject(compiled)
        assert_near(compiled(**batch).logits, plain, base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["bart", "bert"])
def test_a_second_method_is_refused_wherever_the_first_is(architecture, method):
    model = MODELS[architecture]()
    path = model.base_model_prefix
    for first, second, message in (
        (model.base_model, model, rf"model\.{path} of this .* already carries '{method}'"),
        (model, model.base_model, f"already carries '{method}', injected into the .* around it"),
    ):
        pelt_fast.inject(first, small_method(method))
        before, trains = snapshot(model), [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            pelt_fast.inject(second, small_method("lora"))
        assert same(snapshot(model), before)
        assert [p.requires_grad for p in model.parameters()] == trains
        pelt_fast.eject(first)
    assert not any("_pelt" in name for module in model.modules() for name in vars(module))


@pytest.mark.parametrize("action", ACTIONS)
def test_the_outer_model_says_where_the_method_is(inside, action, tmp_path):
    pelt_fast.save(inside.model, tmp_path)
    save_trained(inside.model, tmp_path)
    before = snapshot(inside)
    with pytest.raises(ValueError, match=r"model\.model") as refused:
        ACTIONS[action](inside, tmp_path)
    assert "nothing is injected" not in str(refused.value)
    assert same(snapshot(inside), before)
    assert pelt_fast.eject(inside.model) is inside.model


@pytest.mark.parametrize("action", ACTIONS)
def test_the_inner_model_says_where_the_method_is(action, tmp_path):
    model = pelt_fast.inject(llama(), small_method("lora"))
    pelt_fast.save(model, tmp_path)
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        ACTIONS[action](model.model, tmp_path)


@pytest.mark.parametrize("method", ["lora", "prefix", "houlsby"])
def test_a_base_under_two_heads_carries_one_method(method):
    first, second = llama(), llama()
    second.model = first.model
    pelt_fast.inject(first, small_method(method))
    with pytest.raises(ValueError, match=r"model\.model of this .* shares it"):
        pelt_fast.inject(second, small_method("lora"))
    with pytest.raises(ValueError, match=r"on the LlamaForCausalLM that shares model\.model"):
        pelt_fast.eject(second)
    pelt_fast.eject(first)
    pelt_fast.inject(second, small_method("lora"))


def test_a_model_compiled_after_inject_ejects_and_saves_by_plain_names(tmp_path):
    model = llama()
    before = snapshot(model)
    randomise(pelt_fast.inject(model, small_method("mam")))
    names = set(pelt_fast.inject(llama(), small_method("mam")).state_dict())
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model = torch.compile(model.model, backend="eager")
    pelt_fast.save(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert not any("_orig_mod" in name for name in file.keys())  # noqa: SIM118
        assert {n for n in file.keys() if not n.endswith(".prefix")} <= names  # noqa: SIM118
    twin = llama()
    twin.load_state_dict(before)
    twin.model.layers[1] = torch.compile(twin.model.layers[1], backend="eager")
    pelt_fast.load(twin, tmp_path)
    batch = inputs(twin)
    torch.testing.assert_close(twin.eval()(**batch).logits, model.eval()(**batch).logits)
    for each in (model, twin):
        pelt_fast.eject(each)
        found = {name.replace("_orig_mod.", ""): value for name, value in snapshot(each).items()}
        assert same(found, before)


def test_peft_around_an_injected_base(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    before = snapshot(model)
    pelt_fast.inject(model, small_method("houlsby"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert pelt_fast.count_parameters(wrapped).kept == pelt_fast.count_parameters(model).kept
    pelt_fast.save(wrapped, tmp_path, include_trained=False)
    wrapped.unload()
    pelt_fast.eject(model)
    assert same(snapshot(model), before)
    pelt_fast.load(model, tmp_path)


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("copied", [False, True])
def test_a_shared_config_is_no_bridge_between_models(architecture, copied):
    first = MODELS[architecture](dropout=0.0).eval()
    second = type(first)(first.config).eval()
    assert second.config is first.config
    choice, batch = first.config._attn_implementation, inputs(first)
    plain = second(**batch).logits
    for model in (first, second):
        pelt_fast.inject(model, small_method("prefix"))
    if copied:
        first = pickle.loads(pickle.dumps(copy.deepcopy(first)))
    held = {id(m.config) for m in first.base_model.modules() if hasattr(m, "config")}
    assert id(first.config) in held  # as it was, what shared a config shares one
    prefixed = second(**batch).logits
    pelt_fast.eject(first)
    assert torch.equal(second(**batch).logits, prefixed)
    assert first.config._attn_implementation == choice
    pelt_fast.eject(second)
    assert torch.equal(second(**batch).logits, plain)
    assert second.config._attn_implementation == choice
    assert copied or second.config is first.config


def test_what_is_changed_on_the_config_under_a_prefix_stays_changed():
    model = bert()
    pelt_fast.inject(model, small_method("prefix"))
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.config.own_field = 3
    pelt_fast.eject(model)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.own_field == 3
    assert model.config is model.base_model.encoder.config


@pytest.mark.parametrize("end", ["merge", "eject"])
def test_named_methods_end_with_a_merge_or_an_eject(end):
    model = pelt_fast.inject_named(llama(), {"a": small_method("lora"), "b": small_method("lora")})
    handle = torch.compile(model, backend="eager")
    if end == "merge":
        pelt_fast.merge(handle, keep_base=False)
    else:
        pelt_fast.eject(handle)
    assert not any("pelt" in name for name, _ in model.named_modules())
    for each in (handle, model):
        with pytest.raises(ValueError, match="no named methods"):
            pelt_fast.set_active(each, "b")
    pelt_fast.inject(model, small_method("prefix"))
    with pytest.raises(ValueError, match="no named methods"):
        pelt_fast.set_active(model, "b")


def test_the_trainer_refuses_a_model_around_the_one_with_the_method(inside, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    from pelt_fast.integrations.trainer import PeltTrainer

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"the method is on model\.model"):
        PeltTrainer(inside, arguments, train_dataset=[{}]).train()


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("given", [3, "facebook/bart-large", None], ids=repr)
def test_what_is_no_model_is_refused_by_name(action, given, tmp_path):
    pelt_fast.save(pelt_fast.inject(llama(), "lora"), tmp_path)
    with pytest.raises(TypeError, match=f"model must be .*{type(given).__name__}"):
        ACTIONS[action](given, tmp_path)
