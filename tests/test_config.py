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
    (dict(form="low_rank", target="ffn", size=1, composition="scaled"), "low_rank can target"),
    (dict(form="low_rank", target="ffn.in", size=0), "size .* must be an integer >= 1, got 0"),
    (dict(form="low_rank", target="ffn.in", size=1.5), "must be an integer >= 1, got 1.5"),
    (
        dict(form="low_rank", target="ffn.in", size=1, insertion="sequential"),
        "insertion can be parallel",
    ),
    (dict(form="bottleneck", target="attention", size=1), "insertion can be sequential"),
    (dict(form="bottleneck", target="ffn", size=1, composition="gated"), "composition can be add"),
    (dict(form="prefix", target="heads", size=1, composition="scaled"), "composition can be gated"),
    (dict(form="prefix", target="ffn", size=1), "prefix can target heads"),
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
