"""Files of a model and of its tokenizer that are damaged, or do not fit each other."""

import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import pelt_fast
from pelt_fast import cli
from tests.tasks import chat
from tests.tasks.conftest import SAMPLES

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> str:
    return chat.model_folder(tmp_path_factory.mktemp("model"))


def refused(capsys, *arguments) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"pelt-fast {arguments[0]}: ")
    return line


def train(model, data, output, *more) -> list:
    return ["train", "--model", model, "--data", data, "--steps", "1", "--output", output, *more]


@pytest.mark.parametrize("name, content, what", [
    ("tokenizer.json", "{}", "the tokenizer of"), ("tokenizer.json", "", "the tokenizer of"),
    ("model.safetensors", "", "model"), ("model.safetensors", "no tensors at all", "model"),
    ("config.json", "", "model"), ("config.json", "[]", "model"),
    ("config.json", '{"model_type": "llama", "num_hidden_layers": "two"}', "model"),
])  # fmt: skip
def test_a_damaged_file_is_one_line_that_names_the_model(
    name, content, what, good, tmp_path, capsys
):
    shutil.copytree(good, tmp_path / "bad")
    (tmp_path / "bad" / name).write_text(content)
    data = chat.write(tmp_path / "data", chat.ROWS["text"])
    task = ["--task", "instruct", "--max-length", "96"]
    line = refused(capsys, *train(tmp_path / "bad", data, tmp_path / "out", *task))
    assert f"{what} '{tmp_path / 'bad'}' cannot be loaded: " in line


def with_words(folder: str, *words: str) -> int:
    """Give a model's tokenizer words that the model does not know; the id of the first."""
    own = chat.tokenizer()
    first = len(own)
    own.add_tokens(list(words))
    own.save_pretrained(folder)
    return first


def test_a_token_without_an_embedding_is_told_before_weights_are_read(good, tmp_path, capsys):
    shutil.copytree(good, tmp_path / "bad")
    first = with_words(tmp_path / "bad", "Danube")
    (tmp_path / "bad" / "model.safetensors").unlink()
    task = ["--task", "instruct", "--max-length", "96"]
    data = chat.write(tmp_path / "data", [{"text": "the Danube"}] * 4)
    line = refused(capsys, *train(tmp_path / "bad", data, tmp_path / "out", *task))
    assert f"makes the token {first}, the model knows those below {first}: resize" in line
    data = chat.write(tmp_path / "other", [{"text": "the Rhine"}] * 4)
    line = refused(capsys, *train(tmp_path / "bad", data, tmp_path / "out", *task))
    assert "cannot be loaded" in line  # no row has the token


@pytest.mark.parametrize("task", ["sst2", "xsum"])
def test_what_pads_is_a_token_too(task, models, tmp_path, capsys):
    shutil.copytree(models[task], tmp_path / "bad")
    own = AutoTokenizer.from_pretrained(models[task])
    own.add_special_tokens({"pad_token": "<new>"})
    own.save_pretrained(tmp_path / "bad")
    more = ["--recipe", task, "--max-length", "64", "--max-target", "8", "--max-generated", "8"]
    line = refused(capsys, *train(tmp_path / "bad", SAMPLES / task, tmp_path / "out", *more))
    assert f"makes the token {len(own) - 1:,}, " in line


def test_a_prompt_with_such_a_token_is_refused(good, tmp_path, capsys):
    shutil.copytree(good, tmp_path / "bad")
    model = AutoModelForCausalLM.from_pretrained(good)
    pelt_fast.save(pelt_fast.inject(model, "lora", r=2), tmp_path / "method")
    first = with_words(tmp_path / "bad", "Danube")
    ask = ["generate", tmp_path / "method", "--model", tmp_path / "bad", "--prompt"]
    assert f"makes the token {first}, " in refused(capsys, *ask, "the Danube")
    assert cli.main([str(part) for part in [*ask, "the Rhine", "--max-new-tokens", "2"]]) == 0
