"""LoRA by name: what is wrong is named, and nothing is changed."""

import pytest

import pelt_fast
from pelt_fast import Modification, lora
from tests.models.by_name import MAKERS
from tests.small import gpt2, llama

# model, the words of inject, what the message says
REFUSED = [
    ("llama", dict(targets=["q_prj"]), "no module 'q_prj'; did you mean 'q_proj'"),
    ("llama", dict(targets=["q_proj", "mlp.ups_proj"]), "did you mean 'mlp.up_proj'"),
    ("llama", dict(targets=["zzz"]), "its linear layers end in q_proj, k_proj, v_proj, o_proj"),
    ("llama", dict(targets=r"layers.*q_proj"), "no linear layer 'layers.*q_proj': its linear"),
    ("llama", dict(targets="("), r"'\(' is no regular expression"),
    ("llama", dict(targets=[]), "at least one of q, k, v"),
    ("llama", dict(targets="query"), r"a list of module names, as \['query'\]"),
    ("llama", dict(targets=["self_attn"]), "self_attn is a LlamaAttention: LoRA needs a linear"),
    ("llama", dict(targets=["embed_tokens"]), "embed_tokens is a Embedding: .* it looks rows up"),
    ("own", dict(targets=["patch"]), "patch is a Conv2d: .* a convolution is no product"),
    ("own", dict(targets=["mixer"]), "mixer is a MultiheadAttention: .* reads its weights itself"),
    ("own", dict(targets=["out_proj"]), "MultiheadAttention around it reads its weight"),
    ("bert", dict(targets=["classifier"]), "classifier is in the task head, which trains whole"),
    ("llama", dict(targets=["q_proj"], layers=[1, 2]), "no layer 2: .* in the layers 0 to 1"),
    ("llama", dict(targets="q,v", layers=[2]), "there is no layer 2"),
    ("own", dict(targets=["head"], layers=[0]), "no layer 0: .* in no numbered layer"),
    ("llama", dict(targets=["q_proj"], where=["decoder"]), "where is for targets of the paper"),
    (
        "llama",
        dict(targets=["q_proj"], patterns={"v_proj": dict(r=2)}),
        "pattern 'v_proj' is on no target of this LoRA",
    ),
    (
        "llama",
        dict(targets="q,v", patterns={"q_prj": dict(r=2)}),
        "pattern 'q_prj' is on no target .*did you mean 'q_proj'",
    ),
    (
        "llama",
        dict(targets="q,v", patterns={"q_proj": dict(r=2), "layers.1.*": dict(r=3)}),
        "patterns 'q_proj' and 'layers.1.*' are both on layers.1.self_attn.q_proj",
    ),
    ("llama", dict(patterns={"q_proj": dict(rank=2)}), r"patterns\['q_proj'\] must be dict\(r="),
    ("llama", dict(patterns={"q_proj": dict(r="2")}), "'q_proj'.: r must be an integer >= 1"),
    ("llama", dict(patterns={"q[": dict(r=2)}), "'q.' is no regular expression"),
    ("llama", dict(r=True), "r must be an integer >= 1, got True"),
    ("llama", dict(alpha=float("nan")), "alpha must be a finite number, got nan"),
    ("own", dict(), "model must be a transformers model"),
]


@pytest.mark.parametrize("maker, words, message", REFUSED, ids=[m for *_, m in REFUSED])
def test_what_is_wrong_is_named_and_nothing_is_changed(maker, words, message):
    model = MAKERS[maker]()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    forwards = [module for module in model.modules() if "forward" in module.__dict__]
    with pytest.raises((ValueError, TypeError), match=message):
        pelt_fast.inject(model, "lora", **words)
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert forwards == [module for module in model.modules() if "forward" in module.__dict__]


def test_two_targets_on_one_layer_are_named():
    for other, message in (
        (lora(3, targets="all-linear"), "two LoRA of other size"),
        (lora(2, targets=["self_attn.q_proj"]), "is a target twice"),
    ):
        with pytest.raises(ValueError, match=message):
            pelt_fast.inject(llama(), lora(2, targets=["q_proj"]) + other)
    with pytest.raises(ValueError, match="c_attn:q is a part of a layer that has a LoRA"):
        pelt_fast.inject(gpt2(), lora(2, targets="q") + lora(2, targets=["c_attn"]))


def test_wrong_types_are_named():
    for make, error, message in (
        (lambda: lora(targets=[3]), TypeError, "targets must hold names, got int"),
        (lambda: lora(patterns=["q"]), TypeError, "patterns must be a dict, got list"),
        (lambda: lora(r="8"), ValueError, "r must be an integer >= 1, got '8'"),
        (lambda: Modification("low_rank", "ffn.in", size=2, modules=("a",)), ValueError,
         "modules is for the target 'modules'"),
        (lambda: Modification("prefix", "heads", size=2, composition="gated",
                              patterns=(("a", 2, 1.0),)), ValueError, "patterns is for low_rank"),
        (lambda: Modification("low_rank", "modules", size=2, modules=(3,)), ValueError,
         "modules must hold names"),
        (lambda: Modification("low_rank", "modules", size=2, patterns=(("a", 0, 1.0),)), ValueError,
         "size must be an integer >= 1"),
        (lambda: Modification("bottleneck", "modules", size=2), ValueError, "has no meaning"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()


def test_targets_that_hold_no_names_are_refused():
    with pytest.raises(TypeError, match="targets must be a text or names, got int"):
        pelt_fast.lora(targets=3)
