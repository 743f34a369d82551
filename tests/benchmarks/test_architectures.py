"""The page of all families is its committed result, and nothing on it is wrong."""

import pytest

from benchmarks.architectures import page, process, tiny
from benchmarks.architectures.__main__ import main
from benchmarks.common import newest, newest_path


def test_the_page_is_the_newest_result():
    result = newest(page.PART)
    assert result["finished"] and not result["left"]
    assert page.PAGE.read_text() == page.text(result, newest_path(page.PART).name)


def test_nothing_is_wrong_and_the_families_are_many():
    entries = [entry for entry in newest(page.PART)["entries"] if "not_built" not in entry]
    assert not [e["family"] for e in entries if any("wrong" in c for c in e["cells"].values())]
    held = {m: sum("holds" in e["cells"][m] for e in entries) for m in entries[0]["cells"]}
    assert all(held[m] >= 120 for m in ("lora", "houlsby", "scaled_parallel_adapter")), held
    assert all(held[m] >= 90 for m in ("prefix", "mam")), held


def test_a_reason_has_one_number_whatever_model_gave_it():
    reasons = page.Reasons()
    one = reasons.number("BloomForCausalLM has no biases")
    assert reasons.number("MptModel has no biases") == one == 1
    assert reasons.number("h.1: no method on its FFN") == 2
    assert list(reasons.listed()) == ["1. Has no biases", "2. No method on its FFN"]


def test_a_family_that_hangs_or_cannot_be_built_does_not_stop_the_others(monkeypatch, capsys):
    assert "not_built" in process.family("bert", "NoSuchClass", ["lora"], seconds=60)
    slow = process.family("bert", tiny.families()["bert"][1], ["lora"], seconds=0.001)
    assert slow == {"cells": {}, "not_built": "it took too long"}
    monkeypatch.setattr("sys.argv", ["x", "--only", "bert", "--methods", "lora"])
    assert main() == 0 and "1 holds" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["x", "--only", "brt"])
    with pytest.raises(SystemExit):
        main()
