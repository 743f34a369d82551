"""A recipe file: what one of steps and epochs replaces, and values that have no meaning."""

import pytest

from pelt_fast import cli
from pelt_fast.cli.train import recipe_of
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.recipe import Recipe
from pelt_fast.tasks.recipe_values import LEAST


def written(tmp_path, *lines: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def of_command(*arguments: str) -> Recipe:
    """The recipe that ``pelt-fast train`` makes of its arguments."""
    import argparse

    from pelt_fast.cli import train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return recipe_of(parser.parse_args(arguments))


@pytest.mark.parametrize("extends, line, found", [
    ("instruct", "steps: 2", (2, 0)), ("xsum", "epochs: 1.5", (0, 1.5)),
    ("instruct", "epochs: 2", (0, 2)), ("xsum", "steps: 7", (7, 0)),
    ("instruct", "steps: 2\nepochs: 0", (2, 0)),
])  # fmt: skip
def test_one_of_steps_and_epochs_replaces_what_is_inherited(extends, line, found, tmp_path):
    recipe = recipes.load(written(tmp_path, f"extends: {extends}", line))
    assert (recipe.steps, recipe.epochs) == found


@pytest.mark.parametrize("line, arguments, found", [
    ("epochs: 3", ["--steps", "2"], (2, 0)), ("steps: 3", ["--epochs", "2"], (0, 2)),
])  # fmt: skip
def test_one_of_them_on_the_command_line_replaces_the_files(line, arguments, found, tmp_path):
    recipe = of_command("--recipe", written(tmp_path, "extends: instruct", line), *arguments)
    assert (recipe.steps, recipe.epochs) == found


def test_both_at_one_level_are_refused(tmp_path):
    told = "one of steps and epochs must be positive, got 2 and 3"
    with pytest.raises(ValueError, match=told):
        recipes.load(written(tmp_path, "extends: instruct", "steps: 2", "epochs: 3"))
    with pytest.raises(ValueError, match=told):
        of_command("--task", "instruct", "--steps", "2", "--epochs", "3")


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("value", ["-1", ".inf", ".nan", "'many'", "true", "[1]"])
def test_a_number_without_a_meaning_is_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match=name) as refused:
        recipes.load(written(tmp_path, "extends: instruct", f"{name}: {value}"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["steps", "batch_size", "seed"])
def test_a_fraction_is_not_cut_to_an_integer(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be an integer, got 2.5"):
        recipes.load(written(tmp_path, "extends: instruct", f"{name}: 2.5"))


@pytest.mark.parametrize("arguments, told", [
    (["--steps", "0"], "one of steps and epochs must be positive, got 0 and 0"),
    (["--epochs", "0"], "one of steps and epochs must be positive, got 0 and 0.0"),
    (["--evaluate-every", "-1"], "evaluate_every must be an integer >= 0, got -1"),
    (["--weight-decay", "nan"], "weight_decay must be a number >= 0, got nan"),
    (["--seed", "4294967296"], "seed must be an integer >= 0 and <= 4294967295, got 4294967296"),
    (["--warmup", "-2"], "warmup must be a number >= 0, got -2.0"),
])  # fmt: skip
def test_the_command_line_refuses_it_too(arguments, told, capsys, tmp_path):
    output = tmp_path / "out"
    given = ["train", "--task", "instruct", "--model", "x", "--data", "y", "--output", str(output)]
    assert cli.main([*given, *arguments]) == 2
    assert capsys.readouterr().err == f"pelt-fast train: {told}\n" and not output.exists()


@pytest.mark.parametrize("line, told", [
    ("method: [lora]", "method must be a preset's name or a mapping, got ['lora']"),
    ("method: 5", "method must be a preset's name or a mapping, got 5"),
    ("method: {r: 8}", "method must name a preset, as {preset: lora, r: 8}, got {'r': 8}"),
    ("method: {preset: [lora]}", "method must name a preset"),
    ("sizes: 3", "sizes must be a mapping, got 3"),
    ("sizes: {low_rank: 3}", "sizes of low_rank must be as {size: 30}, got 3"),
    ("sizes: {low_rank: {r: 3}}", "sizes of low_rank must be as {size: 30}, got {'r': 3}"),
    ("model_config: [a]", "model_config must be a mapping, got ['a']"),
    ("adam_betas: 0.9", "adam_betas must be two numbers in [0, 1), got 0.9"),
    ("adam_betas: [0.9, 1]", "adam_betas must be two numbers in [0, 1), got [0.9, 1]"),
    ("task: [instruct]", "task must be text, got ['instruct']"),
    ("model: 5", "model must be text, got 5"),
    ("data:", "data must be text, got None"),
    ("packing: 'no'", "packing must be true or false, got 'no'"),
])  # fmt: skip
def test_a_value_of_another_type_is_one_line(line, told, capsys, tmp_path):
    path = written(tmp_path, "extends: instruct", line)
    assert cli.main(["train", "--recipe", path, "--model", "x"]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_recipe_that_is_no_text_is_named(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"name: \xe9\n")
    assert cli.main(["train", "--recipe", str(tmp_path / "mine.yaml")]) == 2
    assert "mine.yaml is no YAML: 'utf-8' codec can't decode" in capsys.readouterr().err


def test_what_a_recipe_extends_is_a_name(capsys, tmp_path):
    assert cli.main(["train", "--recipe", written(tmp_path, "extends: [instruct]")]) == 2
    assert "extends must be text, got ['instruct']" in capsys.readouterr().err
