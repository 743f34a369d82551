"""The design space: presets, JSON, and what is refused."""

import json

import pytest

import pelt_fast
from pelt_fast import Modification, PeltConfig


@pytest.mark.parametrize("name", pelt_fast.methods())
def test_presets_survive_json(name):
    config = pelt_fast.methods()[name]
    assert PeltConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["name"] == name


def test_presets_are_the_papers():
    presets = pelt_fast.methods()
    prefix, adapter = presets["mam"].modifications
    assert (prefix.size, prefix.composition, prefix.mlp_dim) == (30, "gated", 800)
    assert (adapter.size, adapter.scale, adapter.insertion, adapter.init) == (
        512,
        4.0,
        "parallel",
        "lora",
    )
    prefix, adapter = presets["mam_glue"].modifications
    assert (prefix.size, adapter.size, adapter.scale) == (16, 16, 2.0)
    assert [m.target for m in presets["lora"].modifications] == ["attention.q", "attention.v"]
    assert {(m.insertion, m.init) for m in presets["houlsby"].modifications} == {
        ("sequential", "bert")
    }


BAD = [
    (dict(form="lowrank", target="ffn.in", size=1), "form must be one of"),
    (
        dict(form="low_rank", target="ffn", size=1, composition="scaled"),
        "one of a weight matrix. The nearest is parallel low_rank on ffn.in",
    ),
    (dict(form="low_rank", target="ffn.in", size=0), "size .* must be an integer >= 1, got 0"),
    (dict(form="low_rank", target="ffn.in", size=1.5), "must be an integer >= 1, got 1.5"),
    (
        dict(form="low_rank", target="ffn.in", size=1, insertion="sequential"),
        "reads what the weight reads. The nearest is parallel low_rank on ffn.in",
    ),
    (
        dict(form="bottleneck", target="ffn", size=1, composition="gated"),
        "a gate is the softmax mass .* The nearest is parallel bottleneck on ffn",
    ),
    (
        dict(form="bottleneck", target="attention.q", size=1),
        "a whole sub-layer. The nearest is parallel bottleneck on attention",
    ),
    (
        dict(form="bottleneck", target="heads", size=1, insertion="sequential"),
        "beside what they attend to. The nearest is parallel bottleneck on heads",
    ),
    (
        dict(form="prefix", target="heads", size=1, composition="scaled"),
        "keys and values .* The nearest is parallel prefix on heads, composition 'gated'",
    ),
    (
        dict(form="prefix", target="ffn", size=1),
        "keys and values .* The nearest is parallel prefix on heads",
    ),
    (
        dict(form="low_rank", target="ffn.in", size=1, composition="learned_scale"),
        "scale enough. The nearest is parallel low_rank on ffn.in, composition 'add'",
    ),
    (
        dict(form="prompt", target="ffn", size=1),
        "in front of the input embeddings. The nearest is parallel prompt on embeddings",
    ),
    (dict(form="bias", target="ffn"), "the model's own. The nearest is parallel bias on model"),
    (
        dict(form="bottleneck", target="ffn", size=1, placement="before_output"),
        "placement can be default, after_dropout, before_dropout there, got 'before_output'",
    ),
    (
        dict(form="low_rank", target="ffn.in", size=1, placement="after_norm"),
        "placement can be default there",
    ),
    (
        dict(form="bottleneck", target="attention", size=1, reads="residual"),
        "reads can be default there, got 'residual'",
    ),
    (
        dict(form="bottleneck", target="ffn", size=1, residual=False),
        "residual=False is for sequential",
    ),
    (
        dict(form="bottleneck", target="heads", size=1, reads="query", dropout=0.1),
        "a bottleneck that reads the query is a part of the attention",
    ),
    (
        dict(
            form="bottleneck",
            target="ffn",
            size=1,
            insertion="sequential",
            residual=False,
            placement="around_norm",
        ),
        "adds to the sum in front of the norm: residual=False is for the other placements",
    ),
    (
        dict(form="bottleneck", target="heads", size=1, activation="gelu"),
        "ReLU without a LayerNorm: got activation 'gelu'",
    ),
    (dict(form="bottleneck", target="ffn", size=1, reads="nothing"), "reads must be one of"),
    (
        dict(form="bottleneck", target="ffn", size=1, insertion="sequential", residual="yes"),
        "residual must be one of True, False; got 'yes'",
    ),
    (
        dict(form="bottleneck", target="ffn", size=1, scale=2.0),
        "scale must be 1, got 2.0; use 'scaled'",
    ),
    (
        dict(form="bottleneck", target="ffn", size=1, scale=float("nan"), composition="scaled"),
        "finite",
    ),
    (dict(form="bottleneck", target="ffn", size=1, dropout=1.0), r"dropout must be in \[0, 1\)"),
    (dict(form="bottleneck", target="ffn", size=1, activation="step"), "activation must be one of"),
    (dict(form="bottleneck", target="ffn", size=1, where=("middle",)), "where must be one of"),
    (
        dict(form="prefix", target="heads", size=1, composition="gated", mlp_dim=0),
        "mlp_dim must be",
    ),
]


@pytest.mark.parametrize("fields, message", BAD, ids=lambda v: str(v)[:50])
def test_a_point_without_meaning_is_refused_with_what_has_one(fields, message):
    with pytest.raises(ValueError, match=message):
        Modification(**fields)


def test_the_multi_head_preset_reads_the_query_as_the_papers_code():
    (preset,) = pelt_fast.methods()["multi_head_parallel_adapter"].modifications
    assert preset.reads == "query"
    # in a file of an older preset: its own down projection, as it was trained
    old = PeltConfig("old", (Modification("bottleneck", "heads", size=2),)).to_json()
    assert PeltConfig.from_json(old).modifications[0].reads == "default"


def test_a_config_refuses_what_cannot_stand_together():
    full, lora = Modification("full", "model"), Modification("low_rank", "ffn.in", size=2)
    with pytest.raises(ValueError, match="stands alone"):
        PeltConfig("x", (full, lora))
    with pytest.raises(ValueError, match="two low_rank modifications of ffn"):
        PeltConfig("x", (lora, lora))
    with pytest.raises(ValueError, match="dtype must be one of"):
        PeltConfig("x", (lora,), dtype="int8")
    with pytest.raises(TypeError, match="modifications must hold Modification"):
        PeltConfig("x", ("lora",))
