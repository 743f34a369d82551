"""Two runs do not share a folder: the second is refused before anything is loaded."""

import dataclasses
import json

import pytest

from pelt_fast import cli
from pelt_fast.integrations.trainer import last_checkpoint
from pelt_fast.tasks import study
from pelt_fast.tasks.meter import LOG
from pelt_fast.tasks.paper import TABLES
from pelt_fast.tasks.run import run
from tests.tasks.conftest import SAMPLES
from tests.tasks.test_train import short

pytest.importorskip("datasets")
NOWHERE = ["train", "--recipe", "sst2", "--model", "nowhere", "--data", "nowhere", "--output"]


@pytest.mark.parametrize("name", [LOG, "pelt_config.json"])
def test_a_run_that_is_there_is_not_mixed_with_another(name, tmp_path, capsys):
    (tmp_path / name).write_text("{}\n")
    assert cli.main([*NOWHERE, str(tmp_path)]) == 2
    told = f"--output: {tmp_path} holds a run already: name another folder\n"
    assert capsys.readouterr().err == f"pelt-fast train: {told}"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_no_folder(tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert cli.main([*NOWHERE, str(tmp_path / "out")]) == 2
    assert "is a file, a folder is needed" in capsys.readouterr().err


def test_what_is_no_run_may_be_there(tmp_path, capsys):
    for name in ("results.jsonl", "recipe.yaml"):  # results of several runs, a recipe
        (tmp_path / name).write_text("{}\n")
    assert cli.main([*NOWHERE, str(tmp_path)]) == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_nothing_to_resume_is_said_at_once(tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()  # interrupted while it was written
    assert cli.main([*NOWHERE, str(tmp_path), "--resume"]) == 2
    assert f"--resume: {tmp_path} holds no complete checkpoint" in capsys.readouterr().err


def test_a_run_is_refused_over_another_and_resumes(models, tmp_path):
    recipe = short("sst2-lora", models, steps=2, evaluate_every=1)
    given = dict(quiet=True, results=tmp_path / "results.jsonl")
    run(recipe, SAMPLES / "sst2", tmp_path / "out", **given)
    before = (tmp_path / "out" / LOG).read_text()
    with pytest.raises(ValueError, match="already: continue it with --resume, or name another"):
        run(recipe, SAMPLES / "sst2", tmp_path / "out", **given)
    assert (tmp_path / "out" / LOG).read_text() == before
    longer = recipe.replace(steps=4)
    row = run(longer, SAMPLES / "sst2", tmp_path / "out", resume=True, **given)
    assert row["steps"] == 4 and last_checkpoint(tmp_path / "out").name == "checkpoint-4"


def test_a_study_begins_a_run_anew_that_was_stopped_before_its_first_checkpoint(models, tmp_path):
    found = TABLES["table2"]
    rows = tuple(r for r in found.rows if r.label.startswith("Pfeiffer"))
    table = dataclasses.replace(found, rows=rows, tasks=("sst2",))
    given = dict(tasks=("sst2",), model=models["sst2"], seeds=(1,), steps=2, batch_size=4,
                 max_length=64, evaluate_every=1, say=lambda line: None)  # fmt: skip
    study.run_paper(table, SAMPLES, tmp_path / "a", **given)
    (folder,) = (tmp_path / "a").glob("sst2-*")
    stopped = tmp_path / "b" / folder.name
    stopped.mkdir(parents=True)
    (stopped / LOG).write_text('{"step": 99}\n')
    study.run_paper(table, SAMPLES, tmp_path / "b", **given)
    steps = [json.loads(line)["step"] for line in (stopped / LOG).read_text().splitlines()]
    assert max(steps) == 2
