"""What is told of a method before weights are read, with a row of the table and without one."""

import json
import logging

import pytest
import torch

import pelt_fast
from benchmarks.architectures import tiny
from pelt_fast import cli
from pelt_fast.tasks import found_layout
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.fitting import checked_config, without_memory
from pelt_fast.tasks.found_layout import NotKnown
from pelt_fast.tasks.kinds import auto_class, fitting_task, kind_of
from pelt_fast.tasks.registry import task_of
from tests.tasks import chat

pytest.importorskip("trl")


def model_folder(folder, kind: str, weights: bool = True) -> str:
    """A tiny causal model of a family, with or without its weights."""
    own = chat.tokenizer()
    sizes = dict(vocab_size=len(own), max_position_embeddings=chat.POSITIONS)
    config = tiny.config(kind, **sizes)
    own.save_pretrained(folder)
    if weights:
        auto_class(task_of("instruct")).from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return str(folder)


def recipe_of(config, method: str):
    name = f"{fitting_task(kind_of(config))}-{method}"
    return recipes.load(name).replace(model="x", max_length=32, max_target=32)


def counts(model) -> tuple[int, int]:
    count = pelt_fast.count_parameters(model)
    return count.base, count.trainable


def on_weights(recipe, config):
    """The model with random weights and the method."""
    model = auto_class(task_of(recipe.task)).from_config(config)
    return pelt_fast.inject(model, recipe.config())


@pytest.mark.parametrize("most", [found_layout.MOST, 0], ids=["whole", "first layers"])
@pytest.mark.parametrize("kind, method, layers", [
    ("stablelm", "mam", 4), ("phi", "lora", 4), ("gpt_neox", "prefix", 4), ("llama", "mam", 4),
    ("deepseek_v3", "lora", 4),  # the first layer has no experts
    ("bamba", "lora", 4),  # the first layers have no attention
    ("distilbert", "lora", 4), ("marian", "mam", 2),
])  # fmt: skip
def test_the_method_is_what_inject_puts_on_weights(kind, method, layers, most, monkeypatch):
    monkeypatch.setattr(found_layout, "MOST", most)
    changes = {} if kind == "marian" else dict(num_hidden_layers=layers)
    config = tiny.config(kind, **changes)
    recipe = recipe_of(config, method)
    model = without_memory(recipe, config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert counts(model) == counts(on_weights(recipe, config))


def test_a_method_without_a_layout_needs_no_search():
    config = tiny.config("mamba")
    recipe = recipe_of(config, "lora").reworded(dict(targets="all-linear"))
    assert counts(without_memory(recipe, config)) == counts(on_weights(recipe, config))


def test_a_check_draws_no_random_number_and_says_nothing(caplog):
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="pelt_fast"):
        for kind in ("llama", "stablelm"):
            config = tiny.config(kind)
            without_memory(recipe_of(config, "lora").reworded(dict(r=2)), config)
    assert torch.equal(torch.get_rng_state(), state) and not caplog.records


def test_layers_that_do_not_tell_of_the_others_are_left_to_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(found_layout, "MOST", 0)
    config = tiny.config("big_bird")  # its forward changes its attentions
    recipe = recipe_of(config, "lora")
    with pytest.raises(NotKnown, match="cannot be told without the weights: its first layers"):
        without_memory(recipe, config)
    config.save_pretrained(tmp_path)
    assert checked_config(recipe.replace(model=str(tmp_path))).model_type == "big_bird"


@pytest.mark.parametrize("command", ["init", "dry run", "train"])
def test_the_commands_take_a_family_without_a_row(command, tmp_path, capsys):
    model = model_folder(tmp_path / "model", "stablelm")
    data = str(chat.write(tmp_path / "data", chat.ROWS["messages"], repeat=4))
    output = str(tmp_path / "out.yaml")
    given = ["--model", model, "--data", data, "--output", output]
    train = ["train", "--task", "instruct", "--max-length", "96", *given]
    arguments = {"init": ["init", *given], "dry run": [*train, "--dry-run"],
                 "train": [*train, "--steps", "1"]}[command]  # fmt: skip
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    assert told.out and "self-test" not in told.err and "layout" not in told.err


@pytest.mark.parametrize("command", [["init"], ["train", "--task", "instruct", "--dry-run"]])
def test_a_family_without_a_layout_is_told_what_the_command_line_has(command, tmp_path, capsys):
    model = model_folder(tmp_path / "model", "mamba")
    data = str(chat.write(tmp_path / "data", chat.ROWS["messages"], repeat=4))
    output = str(tmp_path / "out.yaml")
    assert cli.main([*command, "--model", model, "--data", data, "--output", output]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'mamba'" in line and "--set targets=all-linear" in line and "inject(" not in line
    given = ["train", "--task", "instruct", "--model", model, "--dry-run"]
    assert cli.main([*given, "--set", "targets=all-linear"]) == 0


REFUSED = [
    (["--set", "targets=q_prj,v_proj"], "has no module 'q_prj'; did you mean 'q_proj'"),
    (["--set", "layers=0-7"], "there is no layer 2"),
    (["--set", 'patterns={"q_prj": {"r": 4}}'], "q_prj"),
    (["--method", "linear_probe"], "trains the task head alone"),
]


@pytest.mark.parametrize("kind, more, told", [
    *((kind, *refused) for kind in ("llama", "stablelm") for refused in REFUSED),
    ("llama", ["--method", "bitfit"], "has no biases"),
])  # fmt: skip
def test_train_refuses_a_method_before_it_reads_weights(kind, more, told, tmp_path, capsys):
    model = model_folder(tmp_path / "model", kind, weights=False)
    data = str(chat.write(tmp_path / "data", chat.ROWS["messages"]))
    arguments = ["train", "--task", "instruct", "--model", model, "--data", data,
                 "--max-length", "96", "--output", str(tmp_path / "never")]  # fmt: skip
    assert cli.main([*arguments, *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line and not (tmp_path / "never").exists()


def test_a_method_that_fits_comes_to_the_weights(tmp_path, capsys):
    model = model_folder(tmp_path / "model", "llama", weights=False)
    data = str(chat.write(tmp_path / "data", chat.ROWS["messages"]))
    given = ["--model", model, "--data", data, "--max-length", "96"]
    assert cli.main(["train", "--task", "instruct", *given, "--output", str(tmp_path / "o")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["llama", "stablelm"])
def test_explain_takes_words(kind, tmp_path, capsys):
    model = model_folder(tmp_path / "model", kind, weights=False)
    arguments = ["explain", model, "--method", "lora", "--json", "--set"]
    assert cli.main([*arguments, "targets=q_proj,up_proj", "r=4"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert {site["name"].rpartition(".")[2] for site in sites} == {"q_proj", "up_proj"}
    assert cli.main(["explain", "nowhere", "--method", "lora", "--set", "rank=4"]) == 2
    assert "'rank' does not apply to 'lora'" in capsys.readouterr().err
