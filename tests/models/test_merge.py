"""merge and unmerge: the same function, the base again bit for bit, refusals."""

import copy
import pickle

import pytest
import torch

import pelt_fast
from pelt_fast import Modification, PeltConfig
from tests.models.judge import assert_near, exactly
from tests.models.test_generate import tokens
from tests.models.test_inject import same, snapshot
from tests.models.test_parity import injected, small_method
from tests.small import MODELS, MORE, gpt2, inputs, llama, opt, randomise

LINEAR = ["lora", "lora_ffn", "prefix_lora_ffn"]


def activation_of(architecture):
    return "silu" if architecture == "llama" else "gelu"


def base_snapshot(model):
    return {n: v.clone() for n, v in model.state_dict().items() if "pelt_" not in n}


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("architecture", MODELS)
def test_merged_is_the_same_function_and_unmerge_the_same_bits(architecture, method):
    model = injected(architecture, method).eval()
    batch, before = inputs(model, padding="left"), base_snapshot(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    assert pelt_fast.merge(model) is model
    assert_near(model(**batch).logits, expected, exact)
    assert not same(base_snapshot(model), before)
    plans = {site.plan for site in pelt_fast.explain(model).sites if site.op == "lora"}
    assert plans == {"merged"}
    assert pelt_fast.unmerge(model) is model
    assert same(base_snapshot(model), before)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("architecture", ["bart", "mbart", "llama"])
def test_merged_generates_the_same_tokens(architecture):
    model = injected(architecture, "lora", scale=0.3).eval()
    batch = inputs(model)
    expected = tokens(model, batch)
    assert torch.equal(tokens(pelt_fast.merge(model), batch), expected)


def test_a_merge_into_bf16_is_rounded_once():
    model = pelt_fast.inject(MODELS["llama"]().bfloat16(), small_method("lora"))
    randomise(model)
    linear = model.model.layers[0].self_attn.q_proj
    site, weight = linear.pelt_lora, linear.weight.detach().clone()
    pelt_fast.merge(model)
    exact = weight.double() + site.scale * site.lora_b.double() @ site.lora_a.double()
    assert torch.equal(linear.weight, exact.float().bfloat16())


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("architecture", ["bart", "bert", "roberta"])
def test_an_ffn_adapter_of_the_blocks_activation_becomes_a_wider_block(architecture, learned):
    composition = "learned_channel_scale" if learned else "scaled"
    adapter = Modification("bottleneck", "ffn", "parallel", composition, 5, 2.0, "gelu")
    model = randomise(pelt_fast.inject(MODELS[architecture](), PeltConfig("x", (adapter,)))).eval()
    batch, before = inputs(model, padding="right"), base_snapshot(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    with pytest.raises(ValueError, match="folded on request"):
        pelt_fast.merge(model)
    pelt_fast.merge(model, widen_ffn=True)
    assert_near(model(**batch).logits, expected, exact)
    assert any(v.shape != before[n].shape for n, v in base_snapshot(model).items())
    pelt_fast.unmerge(model)
    assert same(base_snapshot(model), before)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("architecture", MODELS)
def test_an_adapter_without_activation_folds_into_its_projection(architecture, residual):
    adapter = Modification("bottleneck", "attention", "sequential", "scaled", 5, 0.5, "identity",
                           residual=residual)  # fmt: skip
    model = randomise(pelt_fast.inject(MODELS[architecture](), PeltConfig("x", (adapter,)))).eval()
    batch, before = inputs(model), base_snapshot(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.merge(model)
    assert_near(model(**batch).logits, expected, exact)
    pelt_fast.unmerge(model)
    assert same(base_snapshot(model), before)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("architecture", MODELS)
def test_without_a_copy_the_model_is_a_plain_one_again(architecture, tmp_path):
    model = injected(architecture, "lora").eval()
    attributes = {n for n, _ in MODELS[architecture]().named_parameters()}
    batch = inputs(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.merge(model, keep_base=False)
    assert {n for n, _ in model.named_parameters()} == attributes and not hasattr(model, "_pelt")
    assert_near(model(**batch).logits, expected, exact)
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path).eval()
    assert_near(twin(**batch).logits, expected, exact)


def test_what_is_left_of_a_merge_without_a_copy_cannot_be_unmerged():
    model = injected("bart", "prefix_lora_ffn").eval()
    pelt_fast.merge(model, keep_base=False)
    with pytest.raises(ValueError, match="merged already"):
        pelt_fast.merge(model)
    for call in (pelt_fast.unmerge, pelt_fast.eject):
        with pytest.raises(ValueError, match="no copy of the base is left"):
            call(model)


def test_eject_after_merge_gives_the_base_back():
    base = MODELS["bart"]()
    model = pelt_fast.inject(copy.deepcopy(base), small_method("lora"))
    pelt_fast.merge(randomise(model))
    assert same(snapshot(pelt_fast.eject(model)), snapshot(base))


def test_a_merged_model_neither_trains_nor_saves(tmp_path):
    model = pelt_fast.merge(injected("roberta", "lora"))
    with pytest.raises(RuntimeError, match="merged: its method cannot train"):
        model.train()(**inputs(model))
    with pytest.raises(ValueError, match="unmerge it before save"):
        pelt_fast.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="nothing is injected"):
        pelt_fast.merge(MODELS["bart"]())
    with pytest.raises(ValueError, match="is not merged"):
        pelt_fast.unmerge(pelt_fast.unmerge(model))


@pytest.mark.parametrize(
    "architecture, method, reason",
    [
        ("bart", "prefix", "prefix on this place is not linear"),
        ("bart", "houlsby", "an activation or a LayerNorm is not linear"),
        ("bart", "scaled_parallel_adapter", "activation is gelu, the adapter's relu"),
        ("llama", "scaled_parallel_adapter", "a gated block multiplies"),
    ],
)
def test_what_is_not_linear_is_refused_with_the_reason(architecture, method, reason):
    model = injected(architecture, method)
    before = base_snapshot(model)
    with pytest.raises(ValueError, match=reason):
        pelt_fast.merge(model, widen_ffn=True)
    assert same(base_snapshot(model), before)


LINEAR_ADAPTER = Modification(
    "bottleneck", "attention", "sequential", size=4, activation="identity"
)
SAID = {**MODELS, "opt": opt, "qwen3": MORE["qwen3"]}


@pytest.mark.parametrize("architecture", SAID)
def test_a_merge_that_adds_biases_loads_as_the_same_model(architecture, tmp_path):
    model = SAID[architecture](dropout=0.0)
    randomise(pelt_fast.inject(model, PeltConfig("x", (LINEAR_ADAPTER,)))).eval()
    batch = inputs(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    shared = model.config
    before = copy.deepcopy(shared.to_dict())
    pelt_fast.merge(model, keep_base=False)
    assert_near(model(**batch).logits, expected, exact)
    assert shared.to_dict() == before  # another model may be of it
    model.save_pretrained(tmp_path)
    twin, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert_near(twin.eval()(**batch).logits, expected, exact)


@pytest.mark.parametrize("where", [("encoder", "decoder"), ("encoder",)])
@pytest.mark.parametrize("architecture", ["bart", "bert", "roberta"])
def test_a_wider_block_loads_as_the_same_model(architecture, where, tmp_path):
    if architecture == "bart" and where == ("encoder",):
        fields = {"encoder_ffn_dim": 53, "decoder_ffn_dim": 48}
    else:
        fields = dict.fromkeys(
            ("encoder_ffn_dim", "decoder_ffn_dim") if architecture == "bart" else
            ("intermediate_size",), 53,
        )  # fmt: skip
    adapter = Modification("bottleneck", "ffn", size=5, activation="gelu", where=where)
    model = randomise(pelt_fast.inject(MODELS[architecture](), PeltConfig("x", (adapter,)))).eval()
    batch = inputs(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.merge(model, widen_ffn=True, keep_base=False)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.base_model.config is model.config
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path).eval()
    assert_near(twin(**batch).logits, expected, exact)


@pytest.mark.parametrize("case", ["t5 has no biases", "one layer of two is wider"])
def test_what_no_config_can_say_is_refused_and_nothing_changed(case):
    if case == "t5 has no biases":
        model = MORE["t5"](dropout=0.0)
        pelt_fast.inject(model, PeltConfig("x", (LINEAR_ADAPTER,)))
    else:
        model = opt(dropout=0.0)
        adapter = Modification("bottleneck", "ffn", size=4, activation="relu")
        layers, model.model.decoder.layers = model.model.decoder.layers, None
        model.model.decoder.layers = layers[:1]
        pelt_fast.inject(model, PeltConfig("x", (adapter,)))
        model.model.decoder.layers = layers
    randomise(model).eval()
    before, batch = base_snapshot(model), inputs(model)
    expected = model(**batch).logits
    with pytest.raises(ValueError, match="Merge with keep_base=True"):
        pelt_fast.merge(model, widen_ffn=True, keep_base=False)
    assert same(base_snapshot(model), before)
    assert torch.equal(model(**batch).logits, expected)
    pelt_fast.unmerge(pelt_fast.merge(model, widen_ffn=True))
    assert same(base_snapshot(model), before)


def test_a_conv1d_block_is_not_widened():
    adapter = Modification("bottleneck", "ffn", size=4, activation="gelu_tanh")
    model = randomise(pelt_fast.inject(gpt2(dropout=0.0), PeltConfig("x", (adapter,))))
    before = base_snapshot(model)
    with pytest.raises(ValueError, match="cannot grow"):
        pelt_fast.merge(model, widen_ffn=True)
    assert same(base_snapshot(model), before)


@pytest.mark.parametrize("keep_base", [True, False])
def test_an_adapter_folds_into_what_its_lora_made(keep_base):
    lora = Modification("low_rank", "attention.o", size=3)
    model = pelt_fast.inject(llama(), PeltConfig("x", (lora, LINEAR_ADAPTER)))
    randomise(model).eval()
    before, batch = base_snapshot(model), inputs(model)
    expected, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.merge(model, keep_base=keep_base)
    assert_near(model(**batch).logits, expected, exact)
    if keep_base:
        assert same(base_snapshot(pelt_fast.unmerge(model)), before)


CASTS = {
    "nothing": lambda model: model,
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "there and back": lambda model: model.bfloat16().float(),
    "double": lambda model: model.double(),
    "meta": lambda model: model.to("meta"),
}


WIDER = Modification("bottleneck", "ffn", size=5, activation="gelu")


@pytest.mark.parametrize(
    "architecture, method",
    [
        ("bert", small_method("lora_ffn")),
        ("llama", PeltConfig("x", (LINEAR_ADAPTER,))),  # where there was no bias
        ("bert", PeltConfig("x", (WIDER,))),
    ],
)
@pytest.mark.parametrize("copied", ["as it is", "deepcopy", "pickle"])
@pytest.mark.parametrize("back", [pelt_fast.unmerge, pelt_fast.eject])
@pytest.mark.parametrize("cast", CASTS)
def test_the_kept_base_is_cast_with_the_model(cast, back, copied, architecture, method):
    base = MODELS[architecture](dropout=0.0)
    model = copy.deepcopy(base)
    randomise(pelt_fast.inject(model, method))
    names = model.state_dict().keys()
    pelt_fast.merge(model, widen_ffn=True)
    assert model.state_dict().keys() - names <= {n for n in model.state_dict() if ".bias" in n}
    if copied != "as it is":
        model = copy.deepcopy(model) if copied == "deepcopy" else pickle.loads(pickle.dumps(model))
    back(CASTS[cast](model))
    CASTS[cast](base)
    if back is pelt_fast.unmerge:
        pelt_fast.eject(model)
    if cast == "meta":
        assert {p.device.type for p in model.parameters()} == {"meta"}
        return
    assert same(snapshot(model), snapshot(base))
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        n: p.dtype for n, p in base.named_parameters()
    }


@pytest.mark.parametrize("cast", ["bfloat16", "there and back"])
def test_a_head_and_biases_come_back_cast(cast):
    base = MODELS["roberta"](dropout=0.0)
    model = copy.deepcopy(base)
    randomise(pelt_fast.inject(model, small_method("bitfit")))
    assert same(snapshot(pelt_fast.eject(CASTS[cast](model))), snapshot(CASTS[cast](base)))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "there and back", "meta"])
def test_methods_that_wait_are_cast_with_the_model(cast):
    methods = {"a": small_method("lora"), "b": small_method("mam"), "c": small_method("bitfit")}
    model = pelt_fast.inject_named(MODELS["roberta"](dropout=0.0), methods)
    waiting = model.pelt_named_methods.kept["b"].trained
    before = {name: tensor.clone() for name, tensor in waiting.items()}
    CASTS[cast](model)
    after = model.pelt_named_methods.kept["b"].trained
    assert before.keys() == after.keys()
    if cast == "meta":
        assert {tensor.device.type for tensor in after.values()} == {"meta"}
        return
    expected = {n: CASTS[cast](torch.nn.ParameterList([t]))[0] for n, t in before.items()}
    assert all(torch.equal(expected[name], after[name]) for name in before)
    pelt_fast.set_active(model, "b")
    assert model.eval()(**inputs(model)).logits.isfinite().all()
