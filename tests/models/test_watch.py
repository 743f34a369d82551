"""What was taken over is looked at again: someone else's patch raises, a wrapper does not."""

import copy
import functools
import pickle
import types

import datasets
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.llama import modeling_llama

import pelt_fast
from pelt_fast.injection.watch import Watch
from tests.models.test_parity import small_method
from tests.small import MEANINGLESS, MODELS, inputs, llama, randomise

METHODS = [n for n in pelt_fast.methods() if n not in ("linear_probe", "full", "bitfit")]
PAIRS = [(a, m) for a in ("llama", "bart", "roberta") for m in METHODS if (a, m) not in MEANINGLESS]


def injected(architecture, method):
    torch.manual_seed(0)
    model = MODELS[architecture](dropout=0.0)
    return randomise(pelt_fast.inject(model, small_method(method, dropout=0.0))).eval()


def taken(model):
    """(path, module) of what runs something of ours; an activation or a dropout whose work a site
    does is read when it runs, and may be replaced."""
    return [(path, module) for path, module in model.named_modules()
            if "forward" in vars(module) and any(True for _ in module.parameters())]  # fmt: skip


OF_FORWARDS = [(a, m) for a, m in PAIRS if taken(injected(a, m))]


def elsewhere(module, *args, **kwargs):
    """Another library's forward, which knows nothing of ours."""
    return type(module).forward(module, *args, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("architecture, method", OF_FORWARDS)
def test_a_forward_that_was_replaced_raises_and_names_it(architecture, method):
    model = injected(architecture, method)
    batch, places = inputs(model), taken(model)
    model(**batch)
    for path, module in (places[0], places[-1]):
        ours = module.forward
        module.forward = types.MethodType(elsewhere, module)
        with pytest.raises(RuntimeError, match=rf"{path}\.forward is .*elsewhere now.*[Ee]ject"):
            model(**batch)
        del module.forward
        with pytest.raises(RuntimeError, match=rf"{path}\.forward is "):
            model(**batch)
        module.forward = ours
        model(**batch)


@torch.no_grad()
@pytest.mark.parametrize("architecture, method", PAIRS)
def test_another_module_on_the_way_to_a_site_raises_and_names_the_path(architecture, method):
    model = injected(architecture, method)
    batch = inputs(model)
    # a site's own parts are its own; a prompt and a bank are children of the stack
    sites = [p.rpartition(".")[0] for p, m in model.named_modules()
             if p.rpartition(".")[2].startswith("pelt_")]  # fmt: skip
    paths = {p for p in sites if p}
    for path in (min(paths), max(paths)):
        parent, _, name = path.rpartition(".")
        holder = model.get_submodule(parent)
        old = holder._modules[name]
        holder._modules[name] = pelt_fast.eject(copy.deepcopy(model)).get_submodule(path)
        with pytest.raises(RuntimeError, match=rf"{path} is .* now, not the {type(old).__name__}"):
            model(**batch)
        holder._modules[name] = old
        model(**batch)


@torch.no_grad()
@pytest.mark.parametrize("architecture, method", PAIRS)
def test_a_site_that_was_taken_away_raises(architecture, method):
    model = injected(architecture, method)
    path = next(p for p, _ in model.named_modules() if p.rpartition(".")[2].startswith("pelt_"))
    parent, _, name = path.rpartition(".")
    del model.get_submodule(parent)._modules[name]
    with pytest.raises(RuntimeError, match=f"{path} is gone now"):
        model(**inputs(model))


def around(forward):
    """A profiler's wrapper."""

    @functools.wraps(forward)
    def timed(*args, **kwargs):
        return forward(*args, **kwargs)

    return timed


@torch.no_grad()
@pytest.mark.parametrize("architecture, method", OF_FORWARDS)
def test_a_wrapper_runs_and_eject_asks_for_it_to_be_taken_off_first(architecture, method):
    model = injected(architecture, method)
    batch = inputs(model)
    expected, places = model(**batch).logits, taken(model)
    before = {path: module.forward for path, module in places}
    for _, module in places:
        module.forward = around(module.forward)
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(RuntimeError, match=r"\.forward is .*around\.<locals>\.timed, which keeps"):
        pelt_fast.eject(model)
    assert torch.equal(model(**batch).logits, expected)
    for path, module in places:
        module.forward = before[path]
    pelt_fast.eject(model)
    assert not taken(model)


@torch.no_grad()
def test_a_closure_that_holds_ours_is_found():
    model = injected("llama", "lora")
    module = taken(model)[0][1]
    ours = module.forward
    module.forward = lambda *args: ours(*args)
    with pytest.raises(RuntimeError, match=r"<lambda> now.*Take that off again"):
        model(**inputs(model))
    with pytest.raises(RuntimeError, match=r"<lambda>, which keeps 'lora' inside"):
        pelt_fast.eject(model)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "mam", "houlsby", "prompt"])
def test_the_watch_follows_copies_and_pickles(method):
    model = injected("bart", method)
    batch = inputs(model)
    expected = model(**batch).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**batch).logits, expected)
        path, module = taken(twin)[0]
        module.forward = types.MethodType(elsewhere, module)
        with pytest.raises(RuntimeError, match=f"{path}.forward"):
            twin(**batch)
        assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "mam", "houlsby"])
def test_a_compiled_layer_a_wrapped_list_and_peft_on_top_are_no_replacement(method):
    model = injected("llama", method)
    batch = inputs(model)
    expected = model(**batch).logits
    model.model.layers = nn.ModuleList(model.model.layers)
    layer = model.model.layers[0]
    model.model.layers[0] = torch.compile(layer, backend="eager")
    model.model.layers[1].compile(backend="eager")
    assert torch.allclose(model(**batch).logits, expected, atol=1e-6)
    model.model.layers[0] = layer
    on_top = get_peft_model(model, LoraConfig(target_modules=["k_proj"]))
    assert torch.allclose(on_top(**batch).logits, expected, atol=1e-6)


@torch.no_grad()
def test_a_stack_alone_and_generate_are_watched():
    model = injected("bart", "lora")
    module = model.model.decoder.layers[0].self_attn.q_proj
    module.forward = types.MethodType(elsewhere, module)
    ids = inputs(model)["input_ids"]
    for call in (model.model.decoder, model.generate):
        with pytest.raises(RuntimeError, match=r"decoder.layers.0.self_attn.q_proj.forward"):
            call(ids)


@pytest.mark.quick(every=3)
@torch.no_grad()
@pytest.mark.parametrize("architecture, method", [("llama", "lora"), ("bart", "mam")])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_graph_of_before_inject_is_not_used_after_it(architecture, method, compiled):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = MODELS[architecture](dropout=0.0).eval()
    batch = inputs(model)
    if compiled:
        model.compile(backend="eager")
    else:
        for module in model.modules():
            if isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer):
                module.compile(backend="eager")
    plain = model(**batch).logits
    randomise(pelt_fast.inject(model, small_method(method, dropout=0.0))).eval()
    found = model(**batch).logits
    with torch.compiler.set_stance("force_eager"):
        expected = model(**batch).logits
    assert torch.allclose(found, expected, atol=1e-5) and not torch.allclose(found, plain)
    path, module = taken(model)[0]
    ours = module.forward
    module.forward = types.MethodType(elsewhere, module)
    with pytest.raises(RuntimeError, match=f"{path}.forward"):
        model(**batch)
    module.forward = ours
    pelt_fast.eject(model)
    assert torch.allclose(model(**batch).logits, plain, atol=1e-5)


def test_liger_through_the_trainer_is_said_and_eject_leaves_its_patch(tmp_path, monkeypatch):
    """Its patch is on the instances: the adapters would be dead."""
    swiglu = pytest.importorskip("liger_kernel.transformers.swiglu")
    # its change of the class is taken back
    monkeypatch.setattr(modeling_llama, "LlamaMLP", modeling_llama.LlamaMLP)
    multiply = staticmethod(lambda gate, up, *_: nn.functional.silu(gate) * up)
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", type("InTorch", (), dict(apply=multiply)))
    model = pelt_fast.inject(llama(), small_method("mam"))
    rows = torch.randint(4, 60, (8, 7)).tolist()
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], use_liger_kernel=True, max_steps=1,
        save_strategy="no", disable_tqdm=True, liger_kernel_config=dict(
            rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=False,
            swiglu=True,
        ),
    )  # fmt: skip
    data = datasets.Dataset.from_dict(dict(input_ids=rows, labels=rows))
    said = r"model.layers.0.mlp.forward is liger_kernel\.\S*LigerSwiGLUMLP\.forward now.*'mam'"
    with pytest.raises(RuntimeError, match=said):
        transformers.Trainer(model, arguments, train_dataset=data).train()
    pelt_fast.eject(model)
    assert "Liger" in model.model.layers[0].mlp.forward.__qualname__
    batch = inputs(model)
    expected = model.eval()(**batch).logits
    pelt_fast.inject(model, small_method("lora"))  # over its patch: the zero update is the base
    assert torch.allclose(model(**batch).logits, expected, atol=1e-6)


def test_a_peft_model_is_watched():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    pelt_fast.accelerate_peft(model)
    batch = inputs(model)
    model(**batch)
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    module.forward = types.MethodType(elsewhere, module)
    with pytest.raises(RuntimeError, match=r"layers.0.self_attn.q_proj.forward is .*elsewhere"):
        model(**batch)


def test_the_check_is_the_first_hook_in_the_order_of_insertion_too():
    """dynamo of torch 2.11 reads the hooks of a module in that order, and compares them so."""
    model = pelt_fast.inject(MODELS["llama"](), "mam")
    seen = 0
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if any(isinstance(hook, Watch) for hook in hooks.values()):
            assert isinstance(next(iter(hooks.values())), Watch)
            assert list(dict.keys(hooks)) == list(hooks)
            seen += len(hooks) > 1
    assert seen
