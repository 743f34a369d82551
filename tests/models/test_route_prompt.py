"""Prompts of several methods in one batch: each row is what its own method alone gives, in fp64."""

import copy
import dataclasses
import pickle
from functools import partial

import pytest
import torch

import pelt_fast
from pelt_fast.injection.method_names import parameters_of_method
from pelt_fast.modules import routing
from tests.models.test_parity import PADDINGS, small_method
from tests.small import MODELS, MORE, PAD, inputs, randomise

ALL = {**MODELS, **MORE}
LENGTHS = {"one": 1, "three": 3, "seven": 7}
MIXTURE = ["seven", None, "one", "lora", "three", "mam", "one"]
EVERY = ["bart", "mbart", "t5", "mt5", "roberta", "deberta-v2", "modernbert", "llama", "mistral",
         "gpt2", "opt"]  # fmt: skip
T = 9


def prompt(length):
    return dataclasses.replace(small_method("prompt").replace(size=length), dtype="float64")


def wide(batch):
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


def ready(make, configs=None):
    """The plain model, each method alone in it, and all of them together."""
    torch.manual_seed(0)
    configs = configs or {
        **{name: prompt(length) for name, length in LENGTHS.items()},
        **{n: dataclasses.replace(small_method(n), dtype="float64") for n in ("lora", "mam")},
    }
    plain = make(dropout=0.0).eval().double()
    together = pelt_fast.inject_named(copy.deepcopy(plain), configs, together=True).eval()
    alone = {None: plain}
    for name, config in configs.items():
        alone[name] = randomise(pelt_fast.inject(copy.deepcopy(plain), config), 0.3).eval()
        values = dict(alone[name].named_parameters())
        with torch.no_grad():
            for key, parameter in parameters_of_method(together, name).items():
                parameter.copy_(values[key])
    for model in (together, *alone.values()):
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
    return alone, together


def made(architecture, prefix=True, **changes):
    """The models of an architecture; with ``prefix`` one method has one. DeBERTa's attention takes
    none."""
    if prefix and architecture != "deberta-v2":
        return ready(partial(ALL[architecture], **changes))
    configs = {name: prompt(length) for name, length in LENGTHS.items()}
    lora = dataclasses.replace(small_method("lora"), dtype="float64")
    return ready(partial(ALL[architecture], **changes), {**configs, "lora": lora, "mam": lora})


def rows_of(names):
    """The rows of each method."""
    return {name: [i for i, n in enumerate(names) if n == name] for name in dict.fromkeys(names)}


def part(batch, rows):
    return {name: tensor[rows] for name, tensor in batch.items()}


def shown(logits, batch, model):
    """The logits of a batch's own tokens."""
    mask = batch.get("attention_mask")
    if mask is None or logits.dim() < 3 or model.config.is_encoder_decoder:
        return logits
    return logits[mask.bool()]


def generated(model, batch, **options):
    kept = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model.generate(**kept, **dict(dict(max_new_tokens=6, do_sample=False,
                                              pad_token_id=PAD), **options))  # fmt: skip


def on_a_device(monkeypatch):
    """Routes that the host cannot read, as those in a GPU's memory."""
    monkeypatch.setattr(routing, "_single", lambda methods: None)
    monkeypatch.setattr(routing.Routes, "present", None)


def assert_rows_alone(alone, together, batch, names=MIXTURE, exact=1e-12):
    """Outputs and gradients of a mixture of methods against each method by itself."""
    with pelt_fast.route(together, names):
        out = together(**batch).logits
        shown(out, batch, together).square().sum().backward()
    assert out.isfinite().all() or "attention_mask" in batch
    for name, rows in rows_of(names).items():
        own, model = part(batch, rows), alone[name]
        expected = model(**own).logits
        apart = (shown(out[rows], own, model) - shown(expected, own, model)).abs().max()
        assert apart <= exact * expected.abs().max(), (name, apart)
        if name is None:
            continue
        shown(expected, own, model).square().sum().backward()
        for key, parameter in parameters_of_method(together, name).items():
            grad = model.get_parameter(key).grad
            if grad is not None:
                apart = (parameter.grad - grad).norm()
                assert apart <= 100 * exact * grad.norm().clamp(min=1e-12), (name, key, apart)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", EVERY)
def test_each_row_is_what_its_method_alone_gives(architecture, padding):
    if (architecture, padding) == ("deberta-v2", "left"):
        pytest.skip("it pools the first token, which is hidden there and sees every hidden one")
    alone, together = made(architecture)
    assert_rows_alone(alone, together, inputs(together, batch=7, padding=padding))


@pytest.mark.parametrize("architecture", ["bart", "roberta", "llama", "opt"])
def test_routes_that_the_host_cannot_read(architecture, monkeypatch):
    on_a_device(monkeypatch)
    alone, together = made(architecture)
    assert_rows_alone(alone, together, inputs(together, batch=7, padding="right"))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("architecture", ["bart", "t5", "roberta", "llama", "gpt2"])
def test_eager_attention_gives_no_nan(architecture, padding):
    alone, together = made(architecture, prefix=False, attn_implementation="eager")
    batch = inputs(together, batch=7, padding=padding)
    exact = 1e-12
    if architecture == "llama":  # of which transformers takes the softmax in fp32
        exact = 1e-5
        for model in (*alone.values(), together):
            model.float()
    assert_rows_alone(alone, together, batch, exact=exact)
    with pelt_fast.route(together, MIXTURE):
        assert together(**batch).logits.isfinite().all()


@torch.no_grad()  # as a bias with gradients T5's takes another kernel
@pytest.mark.parametrize("architecture", ["bart", "t5", "roberta", "llama", "gpt2", "opt"])
def test_one_method_in_all_rows_is_that_method_bit_for_bit(architecture):
    alone, together = made(architecture, prefix=False)
    batch = inputs(together, batch=3, padding="right")
    for name in (*LENGTHS, None):
        with pelt_fast.route(together, [name] * 3):
            assert torch.equal(together(**batch).logits, alone[name](**batch).logits)
    pelt_fast.set_active(together, "three")
    assert torch.equal(together(**batch).logits, alone["three"](**batch).logits)
    with pelt_fast.disabled(together), pelt_fast.route(together, ["one", "three", None]):
        assert torch.equal(together(**batch).logits, alone[None](**batch).logits)


def test_rows_without_a_prompt_get_none_in_front():
    _, together = made("llama")
    batch = inputs(together, batch=3)
    with pelt_fast.route(together, ["lora", None, "mam"]):
        out = together.model(batch["input_ids"], use_cache=True)
    assert out.cache.layers[0].get_seq_length() == T


def test_prompts_of_one_length_need_no_mask(monkeypatch):
    _, together = ready(ALL["llama"], {name: prompt(3) for name in "ab"})
    ids = inputs(together, batch=2)["input_ids"]
    masks = []
    layer = together.model.layers[0]
    take = lambda module, args, kwargs: masks.append(kwargs["attention_mask"])  # noqa: E731
    layer.register_forward_pre_hook(take, with_kwargs=True)
    with pelt_fast.route(together, ["a", "b"]):
        together(ids)
    with pelt_fast.route(together, ["a", None]):
        together(ids)
    assert masks[0] is None and masks[1] is not None


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["bart", "roberta", "llama"])
def test_checkpointing_gives_the_gradients(architecture, reentrant):
    _, together = made(architecture, prefix=False)
    batch = inputs(together.train(), batch=7)
    found = []
    for again in (False, True):
        if again:
            together.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            together.enable_input_require_grads()
        together.zero_grad()
        torch.manual_seed(3)
        with pelt_fast.route(together, MIXTURE):
            loss = together(**batch).loss
        loss.backward()
        found.append({n: p.grad for n, p in together.named_parameters() if p.grad is not None})
    assert all(torch.allclose(found[1][n], grad, atol=1e-12) for n, grad in found[0].items())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_an_ejected_model(again):
    alone, together = made("opt")
    batch = inputs(together, batch=7)
    other = again(together)
    with pelt_fast.route(together, MIXTURE), pelt_fast.route(other, MIXTURE):
        expected = together(**batch).logits
        assert torch.equal(other(**batch).logits, expected)
        randomise(other, 1.0)
        assert torch.equal(together(**batch).logits, expected)
    pelt_fast.eject(together)
    assert torch.equal(together(**batch).logits, alone[None](**batch).logits)


@pytest.mark.parametrize("architecture", ["vit", "whisper"])
def test_a_model_without_a_mask_takes_rows_of_one_length(architecture):
    configs = {"a": prompt(3), "b": prompt(3), "long": prompt(7),
               "lora": dataclasses.replace(small_method("lora"), dtype="float64")}  # fmt: skip
    alone, together = ready(ALL[architecture], configs)
    batch = wide(inputs(together, batch=3))
    for names in (["a", "b", "a"], ["lora", None, "lora"]):
        together.zero_grad()
        assert_rows_alone(alone, together, batch, names)
    ran = []
    for module in together.modules():
        if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda *_: ran.append(1))
    for names, lengths in ((["a", "long", "a"], "3, 7"), (["a", None, "lora"], "0, 3")):
        with pelt_fast.route(together, names), pytest.raises(ValueError, match=lengths):
            together(**batch)
    assert not ran


def test_packed_sequences_are_refused_where_a_prompt_acts():
    lora = dataclasses.replace(small_method("lora"), dtype="float64")
    configs = {"seven": prompt(7), "one": prompt(1), "lora": lora}
    _, together = ready(ALL["llama"], configs)
    ids = inputs(together, batch=1)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for names in (["seven", "lora"], ["one", "one"]):
        refused = pytest.raises(ValueError, match="cannot take packed sequences")
        with pelt_fast.route(together, names, lengths=[4, 5]), refused:
            together(ids, position_ids=positions, use_cache=False)
    with pelt_fast.route(together, ["lora", None], lengths=[4, 5]):
        assert together(ids, position_ids=positions, use_cache=False).logits.isfinite().all()


def test_what_a_prompt_refuses_alone_it_refuses_in_a_mixture():
    _, together = made("llama")
    ids = inputs(together, batch=4)["input_ids"]
    names = ["seven", "one", None, "lora"]
    with pelt_fast.route(together, names):
        with pytest.raises(ValueError, match="attention_mask of shape"):
            together(ids, attention_mask=torch.ones(4, 1, T, T))
        with pytest.raises(ValueError, match="position_ids start again"):
            together(ids, position_ids=torch.arange(T).expand(4, -1) % 5, use_cache=False)
        with pytest.raises(ValueError, match="static cache has no place for the 7 virtual"):
            generated(together, dict(input_ids=ids), cache_implementation="static")
    with pelt_fast.route(together, names[:3]), pytest.raises(ValueError, match="methods of 3 rows"):
        together(ids)
    bart = made("bart")[1]
    with pelt_fast.route(bart, names), pytest.raises(ValueError, match="token_type_ids"):
        bart.model.encoder(ids, token_type_ids=torch.zeros_like(ids))


def test_routes_written_in_place_are_read_in_the_next_forward():
    alone, together = made("llama")
    batch = inputs(together, batch=2)
    ids = together._pelt.routing.ids
    methods = torch.tensor([ids["seven"]] * 2)
    with pelt_fast.route(together, methods):
        together(**batch)
        methods[1] = ids["three"]
        out = together(**batch).logits
    expected = alone["three"](**part(batch, [1])).logits
    assert torch.allclose(out[1:], expected, rtol=0, atol=1e-12)
