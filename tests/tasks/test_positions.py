"""What a model has positions for: rows, prompts and answers that are longer are refused by name."""

import io

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import pelt_fast
from benchmarks.architectures import tiny
from pelt_fast import cli
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.kinds import auto_class
from pelt_fast.tasks.loading import _AFTER_PADDING, positions_of
from pelt_fast.tasks.registry import TASKS
from tests.tasks import chat

POSITIONS = 40
TABLES = ["bert", "electra", "albert", "distilbert", "roberta", "big_bird", "mpt", "gptj", "opt"]


@pytest.mark.parametrize("kind", dict.fromkeys([*_AFTER_PADDING, *TABLES]))
def test_a_model_runs_on_its_positions_and_not_on_more(kind):
    name = "max_seq_len" if kind == "mpt" else "max_position_embeddings"
    config = tiny.config(kind, **{name: POSITIONS}, pad_token_id=1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    length = positions_of(config, None)
    with torch.no_grad():
        model(input_ids=torch.full((1, length), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, length + 1), 5))


def saved(kind: str, folder, task: str = "instruct") -> str:
    """A tiny base with its tokenizer and a saved LoRA; the folder of the LoRA."""
    own = chat.tokenizer()
    name = "max_seq_len" if kind == "mpt" else "max_position_embeddings"
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    config = tiny.config(kind, vocab_size=len(own), **{name: POSITIONS}, **ids)
    torch.manual_seed(0)
    auto_class(TASKS[task]).from_config(config).save_pretrained(folder / "base")
    own.save_pretrained(folder / "base")
    model = auto_class(TASKS[task]).from_pretrained(folder / "base")
    pelt_fast.save(pelt_fast.inject(model, "lora", r=4), folder / "method")
    return str(folder / "method")


@pytest.mark.parametrize("kind, task", [
    ("gpt2", "instruct"), ("opt", "instruct"), ("gptj", "instruct"), ("mpt", "instruct"),
    ("llama", "instruct"), ("bart", "generation"),
])  # fmt: skip
def test_generate_refuses_what_has_no_positions(kind, task, tmp_path, capsys):
    folder = saved(kind, tmp_path, task)
    ask = ["generate", folder, "--plain", "--prompt"]
    assert cli.main([*ask, "a", "b" * (POSITIONS + 1)]) == 2
    told = capsys.readouterr()
    assert told.err == (
        f"pelt-fast generate: --prompt has {POSITIONS + 1} tokens, the model has {POSITIONS}"
        " positions\n"
    )
    assert not told.out  # the first is not answered either
    left = POSITIONS if task == "generation" else POSITIONS - 2
    assert cli.main([*ask, "abc", "--max-new-tokens", str(left + 1)]) == 2
    assert f"--max-new-tokens must be at most {left}, what is left" in capsys.readouterr().err
    assert cli.main([*ask, "abc", "--max-new-tokens", str(left)]) == 0
    assert cli.main([*ask, "abc"]) == 0  # as many as are left
    assert cli.main([*ask, "a" * POSITIONS]) == 0


def test_a_line_of_the_standard_input_is_refused_too(tmp_path, capsys, monkeypatch):
    folder = saved("gpt2", tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 300 + "\n"))
    assert cli.main(["generate", folder, "--plain"]) == 2
    assert "--prompt has 300 tokens" in capsys.readouterr().err


def test_a_template_that_refuses_a_prompt_is_one_line(tmp_path, capsys):
    folder = saved("gpt2", tmp_path)
    own = chat.tokenizer("{{ raise_exception('a system message is needed') }}")
    own.save_pretrained(tmp_path / "base")
    assert cli.main(["generate", folder, "--prompt", "a"]) == 2
    told = "--prompt: the chat template refuses 'a': a system message is needed\n"
    assert capsys.readouterr().err == f"pelt-fast generate: {told}"


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_a_temperature_is_a_number(value, tmp_path, capsys):
    assert cli.main(["generate", "nowhere", "--prompt", "a", "--temperature", value]) == 2
    assert "--temperature must be" in capsys.readouterr().err


def test_a_seed_is_no_longer_than_torch_takes(capsys):
    assert cli.main(["generate", "nowhere", "--prompt", "a", "--seed", str(2**63)]) == 2
    assert "--seed must have at most 63 bits" in capsys.readouterr().err


def test_an_evaluation_generates_in_the_positions(tmp_path, capsys):
    saved("bart", tmp_path, "generation")
    data = chat.write(tmp_path / "data", [{"source": "a", "target": "b"}] * 4)
    given = ["--model", str(tmp_path / "base"), "--data", str(data)]
    short = ["--max-length", "8", "--max-target", "8", "--output", str(tmp_path / "never")]
    assert cli.main(["train", "--task", "generation", *given, *short]) == 2
    assert f"max_generated=128 is longer than the {POSITIONS} positions" in capsys.readouterr().err
    output = str(tmp_path / "mine.yaml")
    assert cli.main(["init", *given, "--output", output]) == 0
    assert recipes.load(output).max_generated == POSITIONS
