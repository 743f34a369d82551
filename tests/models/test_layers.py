"""Methods on some layers only: those layers as with the method everywhere, the others plain."""

import copy
import dataclasses

import pytest
import torch

import pelt_fast
from pelt_fast.injection.count import is_method
from pelt_fast.injection.targets import target_layers
from pelt_fast.injection.watch import Watch
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from pelt_fast.modules import PrefixBank
from tests.models.judge import assert_near, assert_untouched, state
from tests.models.test_parity import small_method
from tests.small import MODELS, MORE, inputs, outputs_and_gradients, randomise

ALL = {**MODELS, **MORE}
ON = (1,)
METHODS = [
    "lora", "lora_ffn", "houlsby", "pfeiffer", "parallel_adapter_attn", "parallel_adapter_ffn",
    "multi_head_parallel_adapter", "learned_scale_parallel_adapter", "prefix", "prefix_nomlp",
    "prefix_ungated", "mam",
]  # fmt: skip
ARCHITECTURES = ["bart", "mbart", "roberta", "llama", "t5", "gpt2", "phi3"]


def on_layers(method: str, layers=ON) -> pelt_fast.PeltConfig:
    return small_method(method, dropout=0.0, layers=layers)


def plain_elsewhere(plain, everywhere, layers):
    """The model with the method everywhere, its other layers put back, which a watch would refuse
    to run."""
    mixed, base = copy.deepcopy(everywhere), base_of(plain)
    for module in mixed.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Watch):
                del module._forward_pre_hooks[key]
    for place in target_layers(base, stacks_of(plain)):
        if place.index not in layers:
            stack = find(base_of(mixed), place.stack.layers)
            stack[place.index] = copy.deepcopy(place.layer).requires_grad_(False)
    return mixed


def exactly_elsewhere(plain, everywhere, batch) -> dict:
    """In fp64, by the reference."""
    plain, everywhere = (copy.deepcopy(model).double() for model in (plain, everywhere))
    with pelt_fast.backend("reference"):
        logits, grads = outputs_and_gradients(plain_elsewhere(plain, everywhere, ON), batch)
    return {"logits": logits, **grads}


@torch.no_grad()
def give(ours, everywhere, layers) -> None:
    """The values of ``everywhere`` on the layers that ``ours`` has."""
    theirs = dict(everywhere.named_parameters())
    banks = {n: m for n, m in everywhere.named_modules() if isinstance(m, PrefixBank)}
    for name, module in list(ours.named_modules()):
        if isinstance(module, PrefixBank):
            bank = banks[name.removesuffix(f"_{layers[0]}")]
            module.fold(bank()[list(layers)])
    for name, parameter in ours.named_parameters():
        if is_method(name) and name in theirs:
            parameter.copy_(theirs[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_asked_for_carry_it_and_no_others(architecture, method):
    torch.manual_seed(0)
    plain = ALL[architecture](dropout=0.0)
    config = on_layers(method, None)
    everywhere = randomise(pelt_fast.inject(copy.deepcopy(plain), config))
    for child in everywhere.modules():
        if isinstance(child, PrefixBank):
            child.fold()
    before = state(plain)
    ours = pelt_fast.inject(copy.deepcopy(plain), on_layers(method))
    give(ours, everywhere, ON)
    for name, head in ours.named_parameters():
        if name in ours._pelt.own_trained:
            head.data.copy_(dict(everywhere.named_parameters())[name])
    assert {s.name.split(".", 2)[1] for s in ours._pelt.sites} <= {"1", "layers", "block", "layer"}
    batch = inputs(ours)
    logits, grads = outputs_and_gradients(ours, batch)
    mixed = plain_elsewhere(plain, everywhere, ON)
    same, same_grads = outputs_and_gradients(mixed, batch)
    exact = exactly_elsewhere(plain, everywhere, batch)
    assert_near(logits, same, exact["logits"])
    compared = [name for name in grads if name in same_grads and is_method(name)]
    assert compared or method.startswith("prefix")
    for name in compared:
        assert_near(grads[name], same_grads[name], exact[name])
    assert_untouched(pelt_fast.eject(ours), before)


@pytest.mark.parametrize("method", ["lora", "mam", "houlsby", "prefix"])
@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_saved_and_loaded_with_its_layers(architecture, method, tmp_path):
    torch.manual_seed(0)
    plain = ALL[architecture](dropout=0.0).eval()
    ours = randomise(pelt_fast.inject(copy.deepcopy(plain), on_layers(method))).eval()
    pelt_fast.save(ours, tmp_path)
    again = pelt_fast.load(copy.deepcopy(plain), tmp_path).eval()
    assert again._pelt.config == ours._pelt.config
    whole = pelt_fast.inject(copy.deepcopy(plain), on_layers(method, None))
    count, all_of_it = map(pelt_fast.count_parameters, (ours, whole))
    assert 2 * count.paper == all_of_it.paper
    batch = inputs(ours)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, ours(**batch).logits)


def test_two_modifications_of_one_place_stand_on_layers_apart():
    torch.manual_seed(0)
    q = small_method("lora", dropout=0.0).modifications[0]
    first, second = (dataclasses.replace(q, layers=(i,), size=3 + i) for i in range(2))
    both = pelt_fast.inject(MODELS["llama"](), pelt_fast.PeltConfig("two", (first, second)))
    assert [site.module.lora_a.shape[0] for site in both._pelt.sites] == [3, 4]
    with pytest.raises(ValueError, match="two low_rank modifications of attention"):
        pelt_fast.PeltConfig("two", (first, dataclasses.replace(second, layers=(0, 1))))
    with pytest.raises(ValueError, match="two low_rank modifications of attention"):
        pelt_fast.PeltConfig("two", (first, q))


def test_prefixes_of_two_lengths_on_layers_apart(tmp_path):
    torch.manual_seed(0)
    prefix = small_method("prefix_nomlp").modifications[0]
    config = pelt_fast.PeltConfig("two", (
        dataclasses.replace(prefix, layers=(0,)), dataclasses.replace(prefix, layers=(1,), size=3),
    ))  # fmt: skip
    plain = MODELS["bart"](dropout=0.0)
    both = randomise(pelt_fast.inject(copy.deepcopy(plain), config)).eval()
    sizes = {m.shape[3] for m in both.modules() if isinstance(m, PrefixBank)}
    assert sizes == {3, 5}
    pelt_fast.save(both, tmp_path)
    again = pelt_fast.load(copy.deepcopy(plain), tmp_path).eval()
    batch = inputs(both)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, both(**batch).logits)
    assert_untouched(pelt_fast.eject(both), state(plain.eval()))


def test_methods_on_layers_apart_add_up():
    torch.manual_seed(0)
    model = pelt_fast.inject_named(
        MODELS["llama"](), {"a": on_layers("lora", (0,)), "b": on_layers("lora", (1,))}
    )
    randomise(model)
    batch = inputs(model)
    pelt_fast.set_active(model, "b")
    randomise(model)
    pelt_fast.set_active(model.eval(), {"a": 1, "b": 1})
    assert len(model._pelt.sites) == 4
    with torch.no_grad():
        both = model(**batch).logits
        assert not torch.equal(pelt_fast.set_active(model, "a")(**batch).logits, both)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_the_model_has_not_is_refused(method):
    plain = MODELS["bart"]()
    before = state(plain)
    with pytest.raises(ValueError, match=r"encoder.layers of BartModel has 2 layers.* no layer 2"):
        pelt_fast.inject(plain, on_layers(method, (0, 2)))
    assert_untouched(plain, before)


@pytest.mark.parametrize("layers", [(), (-1,), (0, 0), (True,), 3, "all", ("0",), (1.0,)], ids=str)
def test_layers_that_are_none_are_refused(layers):
    with pytest.raises(ValueError, match="layers must be None or different integers >= 0"):
        on_layers("lora", layers)


@pytest.mark.parametrize("method", ["prompt", "bitfit", "full"])
def test_what_stands_in_no_layer_has_no_layers(method):
    config = pelt_fast.methods()[method]
    with pytest.raises(ValueError, match="layers is for what stands in layers"):
        config.replace(layers=(0,))


def test_the_json_of_before_is_read_and_written_as_it_was():
    config = small_method("lora")
    assert "layers" not in config.to_json()
    assert pelt_fast.PeltConfig.from_json(config.to_json()) == config
    some = config.replace(layers=[1, 0])
    assert some.modifications[0].layers == (0, 1)
    assert pelt_fast.PeltConfig.from_json(some.to_json()) == some
