"""make record: every part that a page quotes has a command, and what is recorded is not run again."""

import pytest

from benchmarks import common, model, report
from benchmarks.common import parts
from benchmarks.recording import STEPS, Step, main, recorded


def test_every_part_that_a_page_quotes_has_a_command():
    alone = {"equal", "several", "profile", "predict-h200", "traffic", "decode", "demo"}
    quoted = {*parts("layer-"), *parts("model-"), *alone}
    assert quoted <= {step.part for step in STEPS}
    assert set(report.FIGURES) <= {step.part for step in STEPS}


def test_the_steps_of_the_headline_measure_every_method():
    measured = [m for step in STEPS if step.part == report.HEADLINE for m in step.methods]
    assert sorted(measured) == sorted(model.methods())


def test_a_step_is_done_when_a_finished_result_has_its_methods():
    step = Step("model-x", (), ("lora", "mam"))
    entries = [dict(method="lora"), dict(method="mam"), dict(method="prompt")]
    assert step.is_done([dict(finished=True, entries=entries)])
    assert not step.is_done([]) and not step.is_done([dict(finished=False, entries=entries)])
    assert not step.is_done([dict(finished=True, entries=entries[:1])])
    assert Step("decode", ()).is_done([dict(seconds={})])  # a part without entries


def test_only_this_commit_on_this_kind_of_machine_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    here = dict(commit="abc1234", device="CPU AVX2, 2 threads", time="2026-11-27T10:00:00")
    for changed in ({}, dict(commit="def5678"), dict(device="CPU AVX512, 2 threads")):
        about = here | changed
        common.dump(common.result_path("decode", about, tmp_path), dict(machine=about))
    assert [r["machine"] for r in recorded("decode", here)] == [here]
    assert recorded("decode", here | dict(device="CPU AVX2, 16 threads"))
    assert recorded("edges", here) == []


def test_the_list_names_every_part(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(step.part in out for step in STEPS)


def test_an_unknown_part_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["nope"])
    assert stopped.value.code == 2
    assert "unknown part 'nope': choose layer-cpu" in capsys.readouterr().err
