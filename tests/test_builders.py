"""Methods in the field's words: builders, their sums, and changes of a preset."""

import argparse
import json

import pytest
import torch

import pelt_fast
from pelt_fast import (
    Modification,
    PeltConfig,
    adapter,
    bitfit,
    lora,
    multi_head_adapter,
    parallel_adapter,
    prefix,
    prompt,
)
from pelt_fast.cli import train
from pelt_fast.tasks import recipe as recipes
from pelt_fast.words import changed, parsed, words_of
from tests.small import bart

LORA_FFN = lora(r=102, alpha=408, targets="ffn.in, ffn.out")
EXPRESSIONS = {
    "bitfit": bitfit(),
    "prompt": prompt(length=200),
    "prefix": prefix(length=200),
    "prefix_ungated": prefix(30, gated=False),
    "prefix_nomlp": prefix(200, mlp=False),
    "lora": lora(r=16, alpha=32, targets=["q", "v"]),
    "lora_ffn": LORA_FFN,
    "houlsby": adapter(r=200, after="attention+ffn"),
    "pfeiffer": adapter(r=600, after="ffn", placement="around_norm"),
    "parallel_adapter_attn": parallel_adapter(200, beside="attention", init="bert"),
    "parallel_adapter_ffn": parallel_adapter(r=1024, init="bert"),
    "multi_head_parallel_adapter": multi_head_adapter(r=200),
    "scaled_parallel_adapter": parallel_adapter(r=512, scale=4),
    "learned_scale_parallel_adapter": parallel_adapter(r=512, scale="learned"),
    "parallel_attn_parallel_ffn": parallel_adapter(30, beside="attention", init="bert")
    + parallel_adapter(512, init="bert"),
    "prefix_lora_ffn": prefix(30) + LORA_FFN,
    "mam": prefix(30) + parallel_adapter(r=512, scale=4),
    "mam_glue": prefix(16) + parallel_adapter(r=16, scale=2),
}


def test_every_preset_has_an_expression():
    assert EXPRESSIONS.keys() == pelt_fast.methods().keys() - {"full", "linear_probe"}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_is_the_preset(name):
    expected = pelt_fast.methods()[name]
    assert EXPRESSIONS[name] == expected  # whatever they are called
    assert EXPRESSIONS[name].modifications == expected.modifications
    assert (EXPRESSIONS[name].train_head, EXPRESSIONS[name].dtype) == (True, "float32")


def test_a_builder_gives_the_modification_that_its_words_say():
    (m,) = lora(8, 4, targets="o", dropout=0, layers=range(2, 4), where=["decoder"]).modifications
    assert m == Modification(
        "low_rank", "attention.o", composition="scaled", size=8, scale=0.5, dropout=0,
        layers=(2, 3), where=("decoder",),
    )  # fmt: skip
    assert lora(r=8, alpha=8).modifications[0].composition == "add"
    assert lora(layers="0,2-4").modifications[0].layers == (0, 2, 3, 4)
    assert lora(r=16, alpha=8, rslora=True).modifications[0].scale == 2
    channel = parallel_adapter(4, scale="learned_channel").modifications[0]
    assert (channel.composition, channel.scale) == ("learned_channel_scale", 1)


def test_the_name_of_a_sum_says_what_is_in_it():
    both = prefix(3) + lora(4)
    assert both.name == "prefix+lora" and len(both.modifications) == 3
    assert PeltConfig.from_json(both.to_json()) == both


BAD = [
    (lambda: lora(r=0), ValueError, "r must be an integer >= 1, got 0"),
    (lambda: lora(r=2.0), ValueError, "r must be an integer >= 1, got 2.0"),
    (lambda: lora(alpha="32"), TypeError, "alpha must be a number, got str"),
    (lambda: lora(targets="query"), ValueError, "targets must be of q, k, v, o, ffn.in, ffn.out"),
    (lambda: lora(targets=[]), ValueError, "at least one of q, k, v, o"),
    (lambda: lora(dropout=1.0), ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    (lambda: lora(layers=[1, 1]), ValueError, "layers must be None or different integers"),
    (lambda: adapter(after="ffn+ffn"), ValueError, "after must be attention, ffn or attention"),
    (lambda: adapter(after=None), ValueError, "after must be attention, ffn or attention"),
    (lambda: parallel_adapter(beside="heads"), ValueError, "beside must be attention, ffn"),
    (
        lambda: parallel_adapter(scale="big"),
        ValueError,
        "scale must be a number, learned or learned_channel",
    ),
    (lambda: parallel_adapter(scale=None), TypeError, "scale must be a number, got NoneType"),
    (lambda: prefix(length="30"), ValueError, "must be an integer >= 1, got '30'"),
    (lambda: lora() + lora(), ValueError, "two low_rank modifications of attention.q"),
    (lambda: prefix() + "lora", TypeError, "unsupported operand"),
    (
        lambda: PeltConfig("a", dtype="bfloat16") + lora(),
        ValueError,
        "dtype differs: 'a' has bfloat16, 'lora' float32",
    ),
]


@pytest.mark.parametrize("make, error, message", BAD, ids=[message for _, _, message in BAD])
def test_wrong_values_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def preset(name: str, **words) -> tuple[Modification, ...]:
    return changed(pelt_fast.methods()[name], words).modifications


def test_words_change_what_they_apply_to():
    assert preset("lora", r=8, alpha=16) == lora(r=8, alpha=16).modifications
    assert preset("lora", r=8) == lora(r=8, alpha=32).modifications  # alpha stays
    assert preset("lora", targets="q,k", dropout=0) == lora(targets="q,k", dropout=0).modifications
    own = prefix(4, layers=(1, 2)) + parallel_adapter(8, scale=4, layers=(1, 2))
    assert preset("mam", length=4, r=8, layers=range(1, 3)) == own.modifications
    assert preset("scaled_parallel_adapter", scale=1)[0].composition == "add"
    assert (
        preset("prefix_lora_ffn", targets="q", r=2, alpha=2)
        == (prefix(30) + lora(r=2, alpha=2, targets="q")).modifications
    )
    assert preset("mam") == pelt_fast.methods()["mam"].modifications


def test_a_later_rank_keeps_the_alpha_of_the_method():
    """Also of a rank-stabilised LoRA, and of patterns that left it out."""
    stable = lora(r=16, alpha=32, rslora=True)
    assert changed(stable, dict(r=8)) == lora(r=8, alpha=32, rslora=True)
    assert changed(stable, dict(alpha=8)) == lora(r=16, alpha=8, rslora=True)
    assert changed(stable, dict(rslora=False)) == lora(r=16, alpha=32)
    assert PeltConfig.from_json(stable.to_json()) == stable
    assert "rslora" not in lora().to_json()  # as in files from before

    patterns = {"q_proj": dict(r=4), "k_proj": dict(alpha=5), "v_proj": dict(r=2, alpha=7)}
    patterns["o_proj"] = dict(r=4, alpha=8)  # the scale of the rest, by an alpha of its own
    for stable in (False, True):
        own = dict(patterns=patterns, rslora=stable)
        for words in (dict(alpha=64), dict(r=32), dict(r=32, alpha=64), dict(rslora=not stable)):
            wanted = lora(**(dict(r=8, alpha=16) | own | words)).modifications
            found = changed(lora(r=8, alpha=16, **own), words).modifications
            for m, n in zip(found, wanted, strict=True):
                assert m.scale == pytest.approx(n.scale) and m.rslora == n.rslora
                assert [p[:2] for p in m.patterns] == [p[:2] for p in n.patterns]
                assert [p[2] for p in m.patterns] == pytest.approx([p[2] for p in n.patterns])


def test_a_scale_is_that_of_the_patterns_too():
    patterns = {"q_proj": dict(r=4), "v_proj": dict(r=2, alpha=7)}
    (m, *_) = preset("lora", scale=3, patterns=patterns)
    assert m.scale == 3 and m.patterns == (("q_proj", 4, 3.0), ("v_proj", 2, 3.5))
    (m, *_) = changed(lora(patterns=patterns), dict(scale=3)).modifications
    assert m.scale == 3 and m.patterns == (("q_proj", 4, 3.0), ("v_proj", 2, 3.5))
    (m, *_) = changed(PeltConfig("a", (m,)), dict(scale=5)).modifications
    assert m.patterns == (("q_proj", 4, 5.0), ("v_proj", 2, 3.5))


WRONG_VALUES = [
    (dict(method="lora", rslora="no"), "rslora must be true or false, got 'no'"),
    (dict(method="prefix", gated="off"), "gated must be true or false, got 'off'"),
    (dict(method="prefix", mlp=1), "mlp must be true or false, got 1"),
    (dict(method="prefix", length=True), "length must be an integer >= 1, got True"),
    (dict(method="mam", r="2"), "r must be an integer >= 1, got '2'"),
    (dict(method="mam", layers=1), r"layers must be a list or a range, as \[1\], got 1"),
    (dict(method="mam", where="decodr"), "where must be one of .*; got 'decodr'"),
    (dict(method="lora", targets=".*(q_proj"), "targets: .* is no regular expression"),
]


@pytest.mark.parametrize("words, message", WRONG_VALUES, ids=[m for _, m in WRONG_VALUES])
def test_a_value_of_another_kind_is_named(words, message):
    given = dict(words)
    name = given.pop("method")
    with pytest.raises((TypeError, ValueError), match=message):
        preset(name, **given)
    builder = dict(mam=parallel_adapter, lora=lora, prefix=prefix)[name]
    with pytest.raises((TypeError, ValueError), match=message):
        builder(**given)


def test_a_flag_that_is_no_flag_is_refused_before_anything_changes():
    """A text such as "no" would count as true."""
    model = bart()
    for call in (
        lambda: pelt_fast.inject(model, "lora", pack="no"),
        lambda: pelt_fast.inject_named(model, {"a": "lora"}, together="no"),
        lambda: pelt_fast.load(model, "nowhere", head=0),
    ):
        with pytest.raises(TypeError, match="must be true or false"):
            call()
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="train_head must be one of True, False; got 'no'"):
        PeltConfig("a", train_head="no")
    pelt_fast.inject(model, "lora")
    with pytest.raises(TypeError, match="keep_base must be true or false, got 'no'"):
        pelt_fast.merge(model, keep_base="no")


WRONG_WORDS = [
    ("mam", dict(rank=8), "'rank' does not apply to 'mam'.*choose r, .*length"),
    ("mam", dict(lenght=8), "did you mean 'length'"),
    ("mam", dict(alpha=8), "'alpha' does not apply to 'mam'"),
    ("bitfit", dict(r=8), "'r' does not apply to 'bitfit': no word does"),
    ("lora", dict(alpha=8, scale=2), "scale and alpha say the same"),
    ("lora", dict(scale="learned"), "learned"),
    ("lora", dict(r="8"), "r must be an integer >= 1, got '8'"),
    ("prefix", dict(layers=()), "layers must be None or different integers"),
]


@pytest.mark.parametrize("name, words, message", WRONG_WORDS)
def test_a_word_that_does_not_apply_is_named(name, words, message):
    with pytest.raises(ValueError, match=message):
        preset(name, **words)


def test_inject_takes_words_and_configs():
    first = pelt_fast.inject(bart(), "lora", r=3, alpha=6, targets="q,k,v,o")
    second = pelt_fast.inject(bart(), lora(r=3, alpha=6, targets="q,k,v,o"))
    assert (
        pelt_fast.count_parameters(first).trainable == pelt_fast.count_parameters(second).trainable
    )
    model, before = bart(), {n: t.clone() for n, t in bart().state_dict().items()}
    with pytest.raises(ValueError, match="'rank' does not apply to 'lora'"):
        pelt_fast.inject(model, "lora", rank=3)
    assert model.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in model.parameters())


def test_words_that_apply_to_every_preset_are_accepted():
    values = dict(
        r=2, alpha=4, rslora=True, targets="q", scale=3.0, length=2, gated=True, mlp=False,
        mlp_dim=4, dropout=0.0, init="bert", activation="relu", layer_norm="none", layers=(0,),
        where=("encoder",), patterns={".*": dict(r=2)},
    )  # fmt: skip
    for config in pelt_fast.methods().values():
        for word in words_of(config):
            changed(config, {word: values[word]})


def test_settings_of_a_command_line():
    assert parsed(["r=8", "alpha=1e1", "mlp=False", "targets=q,v", "where=encoder,cross"]) == dict(
        r=8, alpha=10.0, mlp=False, targets="q,v", where=("encoder", "cross")
    )
    for text, message in (
        ("r", "word=value"), ("r=", "word=value"), ("=8", "word=value"),
        ("layers=a-b", "numbers and ranges"), ("layers=1-", "numbers and ranges"),
        ("layers=5-2", "layers must run from small to large, as 2-5, got '5-2'"),
    ):  # fmt: skip
        if text == "layers=1-":
            assert parsed([text]) == dict(layers=(1,))
            continue
        with pytest.raises(ValueError, match=message):
            parsed([text])
    with pytest.raises(ValueError, match="r is set twice"):
        parsed(["r=8", "r=9"])


def test_a_recipe_takes_words(tmp_path):
    changed_recipe = recipes.load("xsum-lora").reworded(dict(r=4, alpha=8))
    assert [m.size for m in changed_recipe.config().modifications] == [4, 4]
    assert json.loads(json.dumps(changed_recipe.method))["name"] == "lora"
    file = tmp_path / "own.yaml"
    file.write_text("extends: xsum\nmethod: {preset: lora, r: 4, targets: 'q,o'}\nsizes: {}\n")
    config = recipes.load(str(file)).config()
    assert config.modifications == lora(r=4, targets="q,o").modifications
    file.write_text("extends: xsum\nmethod: {preset: lora, rank: 4}\nsizes: {}\n")
    with pytest.raises(ValueError, match="'rank' does not apply to 'lora'"):
        recipes.load(str(file)).config()


def recipe_of(*words: str) -> PeltConfig:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.recipe_of(parser.parse_args(words)).config()


def test_set_changes_the_method_of_a_command(tmp_path):
    given = ("--recipe", "sst2", "--method", "lora", "--set")
    config = recipe_of(*given, "r=4", "alpha=8", "targets=q,k,v", "layers=0-1")
    assert config.modifications == lora(4, 8, targets="q,k,v", layers=(0, 1)).modifications
    with pytest.raises(ValueError, match="'rank' does not apply to 'lora'"):
        recipe_of(*given, "rank=4")
    # the sizes of a recipe come first
    assert recipe_of("--recipe", "sst2-mam", "--set", "length=3").modifications[0].size == 3


def test_a_sum_trains():
    model = pelt_fast.inject(bart(), prefix(2, mlp_dim=4) + lora(r=2) + adapter(2, after="ffn"))
    ids = torch.randint(4, 60, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
