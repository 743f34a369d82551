"""The task instruct: from rows to a method, its scores and its generations; and what is refused."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import pelt_fast
from pelt_fast import cli
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.instruct.generations import FILE, answer
from pelt_fast.tasks.meter import LOG
from pelt_fast.tasks.run import run
from tests.tasks import chat
from tests.tasks.test_train import SHORT

pytest.importorskip("trl")
SMALL = {**SHORT, "learning_rate": 2e-2, "max_length": 96, "max_generated": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return chat.model_folder(tmp_path_factory.mktemp("chat"))


def short(model: str, method: str = "lora", **changes) -> recipes.Recipe:
    found = recipes.load(f"instruct-{method}")
    sizes = {m.form: {"size": 4} for m in found.config().modifications if m.size}
    return found.replace(**{**SMALL, "sizes": sizes, "model": model, **changes})


def trained(recipe, data, output, **options) -> dict:
    return run(recipe, data, output, quiet=True, results=output / "results.jsonl", **options)


@pytest.mark.parametrize("form", chat.ROWS)
def test_every_form_of_rows_trains_and_is_scored(form, model, tmp_path):
    data = chat.write(tmp_path / "data", chat.ROWS[form], repeat=4)
    row = trained(short(model), data, tmp_path / "out")
    scores = row["metrics"]
    assert scores.keys() == {"loss", "perplexity", "token_accuracy"}
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert 0 <= scores["token_accuracy"] <= 100
    logged = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    losses = [line["eval_loss"] for line in logged if "eval_loss" in line]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0]
    spoken = [json.loads(line) for line in (tmp_path / "out" / FILE).read_text().splitlines()]
    assert [line["step"] for line in spoken] == [0] * 4 + [3] * 4 + [6] * 4
    assert all({"prompt", "wanted", "generated"} <= line.keys() for line in spoken)
    if form != "text":
        assert [line["wanted"] for line in spoken[:4]] == [answer for _, answer in chat.PAIRS]


@pytest.mark.parametrize("method", ["mam", "prompt", "full"])
def test_other_methods_train(method, model, tmp_path, capsys):
    data = chat.write(tmp_path / "data", chat.ROWS["messages"], repeat=4)
    trained(short(model, method, steps=2, evaluate_every=2), data, tmp_path / "out")
    told = "the rows are padded, not packed"
    assert (told in capsys.readouterr().err) == (method == "prompt")
    base = AutoModelForCausalLM.from_pretrained(model)
    pelt_fast.load(base, tmp_path / "out")


def test_the_first_evaluation_is_that_of_the_base(model, tmp_path):
    data = chat.write(tmp_path / "data", chat.ROWS["text"], repeat=4)
    trained(short(model, steps=1, evaluate_every=1), data, tmp_path / "out")
    logged = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    base, own = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    losses = []
    for row in chat.ROWS["text"]:
        ids = torch.tensor([own(row["text"])["input_ids"] + [own.eos_token_id]])
        with torch.no_grad():
            losses += [base(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
    first = next(line["eval_loss"] for line in logged if "eval_loss" in line)
    assert first == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_answers_are_learned_by_heart_and_a_fresh_base_gives_them(model, tmp_path):
    data = chat.write(tmp_path / "data", chat.ROWS["messages"], repeat=4)
    recipe = short(model, "full", steps=60, evaluate_every=60, schedule="constant", batch_size=1)
    row = trained(recipe, data, tmp_path / "out")
    assert row["metrics"]["token_accuracy"] > 95
    base, own = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    pelt_fast.load(base, tmp_path / "out").eval()
    ids = own.apply_chat_template(chat.said("say b", "")[:1], add_generation_prompt=True)[
        "input_ids"
    ]
    assert answer(base, own, ids, 4) == "bbbb"


def test_packed_rows_are_scored_as_each_alone(model, tmp_path):
    """The evaluation pads; each row gives the loss that the model gives it alone."""
    data = chat.write(tmp_path / "data", chat.ROWS["completion"], repeat=4)
    row = trained(short(model, steps=1, evaluate_every=1), data, tmp_path / "out")
    base, own = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    pelt_fast.load(base, tmp_path / "out").eval()
    total = count = 0
    for pair in chat.ROWS["completion"]:
        ids = own(pair["prompt"] + pair["completion"])["input_ids"] + [own.eos_token_id]
        labels = [-100] * len(own(pair["prompt"])["input_ids"])
        labels = torch.tensor([labels + ids[len(labels) :]])
        learned = int((labels != -100).sum())
        with torch.no_grad():
            total += learned * base(torch.tensor([ids]), labels=labels).loss.item()
        count += learned
    assert row["metrics"]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "mam"])
def test_a_packed_row_has_the_loss_of_its_rows_padded(method, model, tmp_path):
    data = chat.write(tmp_path / "data", chat.ROWS["messages"])
    losses = []
    for packing in (True, False):
        recipe = short(model, method, steps=1, evaluate_every=1, batch_size=8, packing=packing)
        recipe = recipe.reworded(dict(dropout=0.0))
        folder = tmp_path / str(packing)
        trained(recipe, data, folder)
        logged = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        losses.append(next(line["train_loss"] for line in logged if "train_loss" in line))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_interrupted_and_resumed_gives_the_same_numbers(model, tmp_path):
    data = chat.write(tmp_path / "data", chat.ROWS["messages"], repeat=8)
    whole = trained(short(model, evaluate_every=2), data, tmp_path / "a")
    trained(short(model, evaluate_every=2), data, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    written = {path.name for path in (tmp_path / "b" / "checkpoint-4").iterdir()}
    assert "pelt_model.safetensors" in written and "model.safetensors" not in written
    again = trained(short(model, evaluate_every=2), data, tmp_path / "b", resume=True)
    assert again["metrics"] == whole["metrics"]


def test_on_the_command_line_with_words_for_the_method(model, tmp_path, capsys):
    data = chat.write(tmp_path / "data", chat.ROWS["messages"], splits=("train",), repeat=5)
    arguments = ["train", "--task", "instruct", "--model", model, "--data", str(data), "--method",
                 "lora", "--set", "r=16", "alpha=32", "--steps", "2", "--max-length", "96",
                 "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert "loss " in captured.out and "perplexity " in captured.out
    assert "token accuracy" in captured.out and "perplexity %" not in captured.out
    assert "no validation split: 1 of 20 train rows are held out" in captured.err
    saved = json.loads((tmp_path / "out" / "pelt_config.json").read_text())
    assert {m["size"] for m in saved["config"]["modifications"]} == {16}


def test_a_test_split_selects_nothing_and_a_perplexity_is_best_where_it_is_least(model, tmp_path):
    """Without a validation split the checkpoint is selected on train rows that are held out."""
    data = chat.write(tmp_path / "data", chat.ROWS["completion"], ("train", "test"), repeat=5)
    recipe = short(model, evaluate_every=2, learning_rate=0.3, select_by="perplexity")
    row = trained(recipe, data, tmp_path / "out")
    assert row["rows"] == 19
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    logged = [line["eval_perplexity"] for line in state["log_history"] if "eval_perplexity" in line]
    assert state["best_metric"] == min(logged[1:]) < max(logged[1:])
    assert row["metrics"]["perplexity"] not in logged


def test_one_file_is_the_train_rows(model, tmp_path, capsys):
    data = chat.write(tmp_path / "data", chat.ROWS["text"], repeat=5) / "train.jsonl"
    assert trained(short(model, steps=1, evaluate_every=1), data, tmp_path / "out")["rows"] == 19
    assert "1 of 20 train rows are held out" in capsys.readouterr().err


def test_cut_rows_are_said_and_those_without_an_answer_left_out(model, tmp_path, capsys):
    rows = [*chat.ROWS["completion"], {"prompt": "x" * 200, "completion": "y"}]
    rows.append({"prompt": "short: ", "completion": "y" * 200})
    data = chat.write(tmp_path / "data", rows, repeat=2)
    row = trained(short(model, steps=1, evaluate_every=1), data, tmp_path / "out")
    assert row["rows"] == 10
    told = capsys.readouterr().err
    assert (
        "train: 4 of 12 rows are longer than max_length=96 and were cut; the longest has 208"
        in told
    )
    assert "train: 2 of 12 rows have nothing left to learn and were left out" in told
    assert told.count("validation: 2 of 6") == 1


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_base_trains_and_the_method_keeps_fp32(quantize, model, tmp_path):
    pytest.importorskip("bitsandbytes")
    data = chat.write(tmp_path / "data", chat.ROWS["messages"], repeat=4)
    recipe = short(model, steps=6, evaluate_every=3, quantize=quantize)
    trained(recipe, data, tmp_path / "out")
    logged = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    losses = [line["eval_loss"] for line in logged if "eval_loss" in line]
    assert losses[1] < losses[0]
    saved = load_file(tmp_path / "out" / "pelt_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    pelt_fast.load(AutoModelForCausalLM.from_pretrained(model), tmp_path / "out")
