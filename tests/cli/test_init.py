"""init looks at a model and rows, and what it writes trains."""

import json
from pathlib import Path

import pytest
import yaml

from pelt_fast import cli
from pelt_fast.tasks import fitting
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.estimate import estimate
from tests.tasks import chat
from tests.tasks.conftest import SAMPLES, models  # noqa: F401  (a fixture)


def written(tmp_path, model: str, data, *more: str) -> str:
    output = tmp_path / "made" / "recipe.yaml"
    arguments = ["init", "--model", model, "--data", str(data), "--output", str(output), *more]
    assert cli.main(arguments) == 0
    return str(output)


@pytest.mark.parametrize("form", ["messages", "text"])
def test_a_causal_model_trains_by_the_recipe_that_is_written(form, tmp_path, capsys):
    pytest.importorskip("trl")
    model = chat.model_folder(tmp_path / "model")
    data = chat.write(tmp_path / "data", chat.ROWS[form], splits=("train",), repeat=10)
    path = written(tmp_path, model, data)
    told = capsys.readouterr().out
    assert f"rows of {form}" in told and f"pelt-fast train --recipe {path}" in told
    recipe = recipes.load(path)
    assert (recipe.task, recipe.model, recipe.data) == ("instruct", model, str(data))
    assert recipe.max_length == chat.POSITIONS and recipe.accumulation == 1
    assert recipe.method == dict(preset="lora", r=16, alpha=32, targets="q,v", dropout=0.1)
    assert (
        cli.main(["train", "--recipe", path, "--epochs", "1", "--output", str(tmp_path / "out")])
        == 0
    )
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert row["rows"] == 38 and row["epochs"] == 1


@pytest.mark.parametrize("task, fits, method", [
    ("sst2", "classification", "mam_glue"), ("xsum", "generation", "mam"), ("xsum", "generation", "lora"),
])  # fmt: skip
def test_other_models_get_their_tasks(task, fits, method, models, tmp_path):  # noqa: F811
    more = ["--method", method] if method == "lora" else []
    recipe = recipes.load(written(tmp_path, models[task], SAMPLES / task, *more))
    assert recipe.task == fits and recipe.config().name == method
    assert recipe.max_length <= 128 and recipe.max_length % 64 == 0


def test_a_row_beyond_the_positions_of_a_roberta_is_cut_and_the_recipe_trains(models, tmp_path):  # noqa: F811
    rows = [{"text": "good film " * 200, "label": i % 2} for i in range(4)]
    data = chat.write(tmp_path / "data", rows)
    path = written(tmp_path, models["sst2"], data, "--method", "lora")
    positions = 130 - 2  # they begin behind the padding index, 1
    assert recipes.load(path).max_length == positions
    arguments = ["train", "--recipe", path, "--steps", "1", "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 0


def test_comments_say_what_was_seen(tmp_path):
    model = chat.model_folder(tmp_path / "model")
    rows = [{"text": "a" * n} for n in (9, 19, 29, 39)]
    path = written(tmp_path, model, chat.write(tmp_path / "data", rows))
    text = Path(path).read_text()
    assert "Rows of text: 4 train, 4 validation" in text
    assert "half have at most 30" in text and "the longest 40; 0 are cut" in text
    assert yaml.safe_load(text)["extends"] == "instruct"


def test_the_steps_that_a_recipe_advises_replace_its_epochs(tmp_path):
    model = chat.model_folder(tmp_path / "model")
    path = Path(written(tmp_path, model, chat.write(tmp_path / "data", chat.ROWS["text"])))
    lines = path.read_text().splitlines()
    (place,) = [i for i, line in enumerate(lines) if line.endswith("; or steps: N")]
    lines[place] = "steps: 2"
    path.write_text("\n".join(lines))
    found = recipes.load(str(path))
    assert (found.steps, found.epochs) == (2, 0)


def test_less_memory_gives_smaller_batches_then_checkpointing(models, tmp_path, monkeypatch):  # noqa: F811
    whole = recipes.load(written(tmp_path, models["sst2"], SAMPLES / "sst2"))
    candidates, model = list(fitting._candidates(whole, "cpu")), fitting.without_memory(whole)
    needs = [estimate(model, candidate, "cpu").bytes for candidate in candidates]
    assert any(candidate.gradient_checkpointing for candidate in candidates)
    for candidate, needed in zip(candidates, needs):
        size = candidate.batch_size * candidate.accumulation
        assert size == whole.batch_size * whole.accumulation  # a step sees as many rows
        free = int(needed / fitting.SHARE) + 1
        monkeypatch.setattr(fitting, "free_memory", lambda device, free=free: free)
        first = next(c for c, n in zip(candidates, needs) if n <= fitting.SHARE * free)
        assert fitting.fitted(whole).recipe == first
    assert needs[candidates.index(first)] < needs[0]


def test_too_little_memory_is_said(models, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(fitting, "free_memory", lambda device: 1000)
    arguments = ["init", "--model", models["sst2"], "--data", str(SAMPLES / "sst2")]
    assert cli.main([*arguments, "--output", str(tmp_path / "recipe.yaml")]) == 2
    assert "GB are free on this" in capsys.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()


def test_what_is_there_is_not_written_over(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("mine: true\n")
    arguments = ["init", "--model", "x", "--data", "y", "--output", str(tmp_path / "recipe.yaml")]
    assert cli.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], str(tmp_path / "recipe.txt")]) == 2
    assert "must end with .yaml" in capsys.readouterr().err


def test_rows_that_do_not_fit_the_model_are_refused(tmp_path, capsys):
    model = chat.model_folder(tmp_path / "model")
    output = tmp_path / "recipe.yaml"
    arguments = ["init", "--model", model, "--data", str(SAMPLES / "xsum"), "--output", str(output)]
    assert cli.main(arguments) == 2
    assert (
        "needs the columns messages, or prompt and completion, or text" in capsys.readouterr().err
    )
    assert not output.exists()
