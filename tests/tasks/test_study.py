"""A table of the study at tiny size: what is done is skipped, the rate comes from held-out rows."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path

import pytest

from pelt_fast import cli
from pelt_fast.tasks import study
from pelt_fast.tasks.bottlenecks import bottlenecks
from pelt_fast.tasks.paper import TABLES
from pelt_fast.tasks.tables import table_rows, text
from tests.tasks.conftest import SAMPLES


@pytest.fixture
def folder(tmp_path) -> Path:
    """The samples, laid out as small.yaml names its files."""
    root = tmp_path / "data"
    for name in ("sst2", "mnli", "enro", "xsum"):
        (root / name).mkdir(parents=True)

    def packed(to: str, *sources: Path) -> None:
        text = "".join(source.read_text() for source in sources)
        (root / to).write_bytes(gzip.compress(text.encode()))

    sst2 = SAMPLES / "sst2"
    packed("sst2/train_60614.tsv.gz", sst2 / "train.tsv")
    packed("sst2/heldout_6735.tsv.gz", sst2 / "train.tsv")
    (root / "sst2/glue_dev_872.tsv").write_text((sst2 / "validation.tsv").read_text())
    for language in ("en", "ro"):
        source = SAMPLES / "wmt16"
        for name in ("newsdev2016", "ntrex128", "flores101-devtest"):
            packed(f"enro/{name}.{language}.gz", source / f"train.{language}")
        packed(f"enro/newstest2016.{language}.gz", source / f"test.{language}")
    return root


@pytest.fixture
def tiny(monkeypatch):
    """small.yaml with as many rows as the samples have."""
    settings = study.small_settings()
    settings["sst2"]["heldout_rows"] = 8
    settings["wmt16"]["heldout_rows"] = 4
    settings["sst2"]["recipe"] |= dict(steps=2, batch_size=4)
    settings["wmt16"]["recipe"] |= dict(steps=2, batch_tokens=128, max_generated=8)
    monkeypatch.setattr(study, "small_settings", lambda: settings)
    return settings


def test_a_small_table_runs_once_and_prints_the_papers_beside_it(models, folder, tiny, tmp_path):
    found = TABLES["table2"]
    rows = tuple(r for r in found.rows if r.label.startswith(("LoRA", "Houlsby")))
    table = dataclasses.replace(found, rows=rows, tasks=("sst2",))
    said: list[str] = []
    for _ in range(2):
        study.run_small(table, folder, models, tmp_path / "out", say=said.append)
    lines = [
        json.loads(line) for line in (tmp_path / "out" / study.RESULTS).read_text().splitlines()
    ]
    assert len(lines) == len(said) == 2 * 2 + 2 * 3, "two rates, three seeds each"
    results = study.Results(tmp_path / "out")
    factor = study.factor(models["sst2"], table.width)
    for row in rows:
        config = study.scaled(row.config, factor)
        scored = study.runs(results, "sst2", config, "final")
        tried = {
            line["learning_rate"]: study.score(line)
            for line in lines if line["phase"] == "rate" and line["label"] == row.label
        }  # fmt: skip
        assert {line["learning_rate"] for line in scored} == {max(tried, key=tried.get)}
    printed = text(table_rows(table, results, {"sst2": factor}))
    assert "94.2" in printed and "±" in printed and printed.count("\n") == 3


def test_rows_of_another_setting_are_not_mixed(models, folder, tiny, tmp_path):
    found = TABLES["table2"]
    rows = tuple(r for r in found.rows if r.label.startswith("Houlsby"))
    table = dataclasses.replace(found, rows=rows, tasks=("sst2",))
    for steps in (2, 3):
        study.run_small(table, folder, models, tmp_path, say=lambda line: None, steps=steps)
    results = study.Results(tmp_path)
    assert len(results.rows) == 2 * (2 + 3)
    config = study.scaled(rows[0].config, study.factor(models["sst2"], table.width))
    found = study.runs(results, "sst2", config, "final")
    assert [row["steps"] for row in found] == [3, 3, 3]


def test_another_model_under_the_same_name_is_another_setting(models, tmp_path):
    folder = shutil.copytree(models["sst2"], tmp_path / "model")
    recipe = study.load_recipe("sst2").replace(model=str(folder))
    first = study.setting(recipe)
    assert first == study.setting(recipe.replace(learning_rate=0.5, seed=7, method="full"))
    assert first != study.setting(recipe.replace(steps=7))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    assert first != study.setting(recipe)


def test_translation_and_the_two_paths_curves(models, folder, tiny, tmp_path):
    found = TABLES["table6"]
    rows = tuple(r for r in found.rows if r.label.startswith("MAM"))
    table = dataclasses.replace(found, rows=rows, tasks=("wmt16",))
    study.run_small(table, folder, models, tmp_path / "out", say=lambda line: None)
    study.run_curves(folder, models, tmp_path / "out", tasks=("wmt16",), say=lambda line: None,
                     steps=10)  # fmt: skip
    results = study.Results(tmp_path / "out").rows.values()
    assert any("bleu" in row["metrics"] for row in results if row["phase"] == "final")
    curves: dict = {}
    for row in results:
        if row["phase"].startswith("curve"):
            curves.setdefault((row["label"], row["seed"]), []).append(row["losses"])
    assert len(curves) == 4
    for one, other in curves.values():
        assert one == pytest.approx(other, abs=2e-3) and one


def test_figure_4_has_a_line_for_each_form_that_ran(models, folder, tiny, tmp_path):
    found = TABLES["figure4"]
    rows = tuple(r for r in found.rows if r.label in ("prefix, l=30", "PA (ffn), r=200"))
    table = dataclasses.replace(found, rows=rows, tasks=("wmt16",))
    results, factors = study.Results(tmp_path), {"wmt16": 0.1}
    assert bottlenecks(table, results, factors, tmp_path / "none.svg") is None
    tiny["seeds"] = [1]
    study.run_small(table, folder, models, tmp_path, say=lambda line: None)
    factors = {"wmt16": study.factor(models["wmt16"], table.width)}
    drawn = bottlenecks(table, study.Results(tmp_path), factors, tmp_path / "figure4.svg")
    text = drawn.read_text()
    assert "<!-- prefix -->" in text and "<!-- PA (ffn) -->" in text


def test_the_papers_size_runs_recipes_and_resumes_none_that_is_done(models, tmp_path):
    found = TABLES["table2"]
    rows = tuple(r for r in found.rows if r.label.startswith("Pfeiffer"))
    table = dataclasses.replace(found, rows=rows, tasks=("sst2",))
    given = dict(tasks=("sst2",), model=models["sst2"], seeds=(1,), steps=2, batch_size=4,
                 max_length=64, evaluate_every=1)  # fmt: skip
    said: list[str] = []
    for _ in range(2):
        study.run_paper(table, SAMPLES, tmp_path / "out", say=said.append, **given)
    assert len(said) == 1 and "Pfeiffer" in said[0]


def test_two_standard_errors():
    assert study.compared([90.0], [80.0, 81.0]) == "one seed: not judged"
    assert study.compared([90.0, 91.0, 92.0], [80.0, 81.0, 82.0]).startswith("the first is better")
    assert study.compared([80.0, 82.0], [81.0, 83.0]).startswith("level")


@pytest.mark.parametrize("arguments, message", [
    (["table2", "--small"], "--data: a folder is needed at small size"),
    (["table2", "--small", "--task", "xsum"], "--task: table2 is of sst2, mnli, got xsum"),
    (["table2", "--small", "--steps", "0"], "--steps must be at least 1, got 0"),
    (["curves", "--small", "--steps", "-1"], "--steps must be at least 1, got -1"),
])  # fmt: skip
def test_bad_input_is_one_line(arguments, message, models, capsys):
    assert cli.main(["study", *arguments, "--model", models["sst2"]]) == 2
    assert message in capsys.readouterr().err


def test_print_shows_a_table_without_a_run(models, tmp_path, capsys):
    arguments = ["study", "table2", "--small", "--print", "--model", models["sst2"], "--output",
                 str(tmp_path)]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| full fine-tuning" in printed and "94.6" in printed
    assert not (tmp_path / "small").exists()
