"""The commands as a user runs them: in a process of their own."""

import json
import subprocess
import sys

import pytest

import pelt_fast
from pelt_fast import cli, testing
from tests.small import roberta


def pelt_fast_command(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "pelt_fast", *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip


def test_info_names_every_backend_and_why_not():
    ran = pelt_fast_command("info", TRITON_INTERPRET="0", CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 0, ran.stderr
    assert "backend       auto       available" in ran.stdout
    assert "triton     there is no GPU (TRITON_INTERPRET=1" in ran.stdout
    ran = pelt_fast_command("info", TRITON_INTERPRET="1")
    assert "backend       triton     available" in ran.stdout


def test_check_is_green_and_writes_json(tmp_path):
    arguments = ("check", "--op", "lora", "--device", "cpu", "--json", tmp_path / "check.json")
    ran = pelt_fast_command(*arguments, TRITON_INTERPRET="0")
    assert ran.returncode == 0, ran.stdout
    results = json.loads((tmp_path / "check.json").read_text())
    assert len(results) == 12 and all(result["ok"] for result in results)
    assert "12 of 12 inside their budget" in ran.stdout


def test_check_runs_the_interpreted_kernels_where_they_are_asked_for():
    ran = pelt_fast_command("check", "--op", "lora", "--device", "cpu", TRITON_INTERPRET="1")
    assert ran.returncode == 0, ran.stdout
    assert "16 of 16 inside their budget" in ran.stdout and " triton " in ran.stdout


def test_check_exits_1_on_a_miss(monkeypatch, capsys):
    """A wrong sign in one gradient of the plan that runs must be seen."""
    from pelt_fast.ops.lora.op import lora_bwd

    right = lora_bwd.cpu

    def wrong(*arguments):
        dx, da, db = right(*arguments)
        return dx, da, -db

    monkeypatch.setattr(lora_bwd, "cpu", wrong)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["check", "--op", "lora", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "MISS lora" in printed and "d_lora_b" in printed and "6 of 12" in printed


def test_the_budget_catches_a_relative_error_of_a_thousandth():
    case = next(testing.cases())
    import torch

    oracle = testing.run(case.expression, case.tensors(torch.float64, torch.float64))
    tensors = case.tensors(torch.float32, torch.float32)
    same, actual = (testing.run(f, tensors) for f in (case.expression, case.call))
    assert testing.compare(actual, same, oracle, torch.float32).ok
    actual["d_x"] = actual["d_x"] * 1.001
    assert not testing.compare(actual, same, oracle, torch.float32).ok
    actual["d_x"][0] = float("nan")
    assert not testing.compare(actual, same, oracle, torch.float32).ok


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A small real model and a word-level tokenizer, as a local folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    words = {
        word: i
        for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "good", "bad", "film", "plot"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    roberta(num_labels=2).save_pretrained(folder)
    return folder


def test_explain_prints_every_site(model_folder, capsys):
    ran = pelt_fast_command("explain", model_folder, "--method", "mam_glue")
    assert ran.returncode == 0, ran.stderr
    assert "encoder.layer.1.intermediate.dense" in ran.stdout
    assert "0 of 4 sites fell back" in ran.stdout
    assert cli.main(["explain", str(model_folder), "--method", "lora", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 4


@pytest.mark.parametrize("suffix, separator", [("tsv", "\t"), ("csv", ","), ("jsonl", None)])
def test_train_learns_a_folder_and_saves_the_method(
    model_folder, tmp_path, capsys, suffix, separator
):
    pytest.importorskip("datasets")
    rows = [("good film", "up"), ("bad film", "down"), ("good plot", "up"), ("bad plot", "down")]
    for split, repeat in (("train", 40), ("dev", 2)):
        lines = []
        for text, label in rows * repeat:
            record = {"text": text, "label": label}
            lines.append(json.dumps(record) if separator is None else f"{text}{separator}{label}")
        header = [] if separator is None else [f"text{separator}label"]
        (tmp_path / f"{split}.{suffix}").write_text("\n".join([*header, *lines]) + "\n")
    arguments = [
        "train", "--data", tmp_path, "--model", model_folder, "--method", "mam_glue",
        "--epochs", 6, "--batch-size", 8, "--learning-rate", 0.01, "--output", tmp_path / "out",
        "--max-length", 48,
    ]  # fmt: skip
    if suffix == "jsonl":  # as a user runs it; a process takes its time to start
        ran = pelt_fast_command(*arguments)
        assert ran.returncode == 0, ran.stderr
        printed = ran.stdout
    else:
        assert cli.main([str(argument) for argument in arguments]) == 0
        printed = capsys.readouterr().out
    assert "classes down, up" in printed and "accuracy 100.00 %" in printed
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
    pelt_fast.load(base, tmp_path / "out")


def test_a_task_without_a_network_names_the_local_way(model_folder, tmp_path):
    pytest.importorskip("datasets")
    ran = pelt_fast_command("train", "--task", "sst2", "--model", model_folder,
                            HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1 and "--data FOLDER" in ran.stderr


BAD = [
    (["train", "--data", "nowhere", "--model", "x"], "nowhere is not a folder"),
    (["train", "--data", ".", "--model", "x", "--method", "mamm"], "unknown method 'mamm'"),
    (
        ["train", "--data", ".", "--model", "x", "--epochs", "-1"],
        "one of steps and epochs must be positive, got 0 and -1",
    ),
    (
        ["train", "--data", ".", "--model", "x", "--learning-rate", "7"],
        "learning_rate must be in",
    ),
    (["train", "--task", "cola", "--model", "x"], "task must be one of sst2, mnli"),
    (["explain", "nowhere", "--method", "mamm"], "unknown method 'mamm'"),
    (["explain", "nowhere"], "nowhere"),
    (["train", "--data", "data", "--model", "nowhere"], "nowhere"),
    (["methods", "--json", "mamm"], "unknown method 'mamm'"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "data" / f"{split}.csv").write_text("text,label\na,1\nb,0\n")
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_folder_without_the_columns_says_which(tmp_path, capsys):
    pytest.importorskip("datasets")
    (tmp_path / "train.csv").write_text("words,label\na,1\n")
    (tmp_path / "dev.csv").write_text("words,label\na,1\n")
    assert cli.main(["train", "--data", str(tmp_path), "--model", "x"]) == 2
    assert "train needs a column text or sentence" in capsys.readouterr().err
    (tmp_path / "train.csv").unlink()
    assert cli.main(["train", "--data", str(tmp_path), "--model", "x"]) == 2
    assert "has no train split; it holds none of train.jsonl" in capsys.readouterr().err


def test_methods_lists_every_preset(capsys):
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in pelt_fast.methods())
    assert cli.main(["methods", "--json", "mam"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mam"
