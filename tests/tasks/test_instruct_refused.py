"""What the task instruct refuses: one clear line, status 2, nothing written."""

import importlib.util
import shutil

import pytest

from pelt_fast import cli
from pelt_fast.tasks.kinds import CAUSAL, ENCODER, OTHER, SEQ2SEQ, fitting_task, kind_of
from tests.small import MODELS, MORE
from tests.tasks import chat
from tests.tasks.conftest import SAMPLES

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("causal")
    return {
        "chat": chat.model_folder(root / "chat"),
        "bare": chat.model_folder(root / "bare", template=None),
        "no pad": chat.model_folder(root / "nopad", pad=False),
    }


def refused(capsys, tmp_path, arguments: list[str]) -> str:
    """The one line of a run that is refused."""
    output = tmp_path / "never"
    assert cli.main(["train", *arguments, "--output", str(output)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert not captured.out and not output.exists()
    return line


def data(tmp_path, form: str = "messages", *more: dict) -> str:
    return str(chat.write(tmp_path / "data", [*chat.ROWS[form], *more]))


def instruct(model: str, rows: str, *more: str) -> list[str]:
    return ["--task", "instruct", "--model", model, "--data", rows, "--max-length", "96", *more]


def test_a_chat_without_a_template(causal, tmp_path, capsys):
    line = refused(capsys, tmp_path, instruct(causal["bare"], data(tmp_path)))
    assert "has no chat template" in line and "tokenizer.chat_template" in line


def test_an_empty_completion(causal, tmp_path, capsys):
    rows = data(tmp_path, "completion", {"prompt": "a", "completion": ""})
    line = refused(capsys, tmp_path, instruct(causal["chat"], rows))
    assert "row 5 of train has an empty completion" in line


def test_a_missing_column(causal, tmp_path, capsys):
    rows = str(chat.write(tmp_path / "data", [{"question": "a", "answer": "b"}]))
    line = refused(capsys, tmp_path, instruct(causal["chat"], rows))
    assert "needs the columns messages, or prompt and completion, or text; it has" in line


def test_rows_longer_than_the_model(causal, tmp_path, capsys):
    arguments = ["--task", "instruct", "--model", causal["chat"], "--data", data(tmp_path)]
    line = refused(capsys, tmp_path, arguments)
    assert "max_length=1024 is longer than the 160 positions" in line


def test_a_model_without_a_tokenizer(causal, tmp_path, capsys):
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{causal['chat']}/{name}", folder)
    line = refused(capsys, tmp_path, instruct(str(folder), data(tmp_path)))
    assert "the tokenizer of" in line and "cannot be loaded: " in line


def test_no_rows_are_named(causal, tmp_path, capsys):
    line = refused(capsys, tmp_path, ["--task", "instruct", "--model", causal["chat"]])
    assert "task instruct is of rows of your own: give --data FOLDER" in line


@pytest.mark.parametrize("missing, arguments, told", [
    ("bitsandbytes", ["--quantize", "nf4"], "needs bitsandbytes: pip install 'pelt_fast[quantised]'"),
    ("trl", [], "needs the extra: pip install 'pelt_fast[instruct]'"),
])  # fmt: skip
def test_a_library_that_is_not_installed(
    missing, arguments, told, causal, tmp_path, capsys, monkeypatch
):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else there(name, *a)
    )
    nowhere = instruct("nowhere", str(tmp_path / "no-rows"), *arguments)  # said before both
    assert told in refused(capsys, tmp_path, nowhere)


def test_quantisation_of_another_task(models, tmp_path, capsys):
    arguments = ["--recipe", "sst2", "--model", models["sst2"], "--quantize", "int8"]
    line = refused(capsys, tmp_path, [*arguments, "--data", str(SAMPLES / "sst2")])
    assert "quantize is for causal language models, not for task sst2" in line


def test_a_causal_model_for_an_encoder_decoders_task(causal, tmp_path, capsys):
    arguments = ["--recipe", "xsum", "--model", causal["chat"], "--data", str(SAMPLES / "xsum")]
    line = refused(capsys, tmp_path, arguments)
    assert "task xsum trains an encoder-decoder" in line
    assert "(llama) is a causal language model: --task instruct fits it" in line


@pytest.mark.parametrize("task, told", [
    ("xsum", "(bart) is an encoder-decoder: --task generation fits it"),
    ("sst2", "(roberta) is an encoder: --task classification fits it"),
])  # fmt: skip
def test_another_model_for_the_causal_task(task, told, models, tmp_path, capsys):
    line = refused(capsys, tmp_path, instruct(models[task], data(tmp_path)))
    assert "task instruct trains a causal language model" in line and told in line


@pytest.mark.parametrize("line, told", [
    ("select_by: perplexty", "must be one of loss, perplexity, token_accuracy; got 'perplexty'"),
    ("batch_tokens: 512", "batch_tokens=512 is not for task instruct: give batch_size"),
])  # fmt: skip
def test_a_setting_that_the_task_does_not_have(line, told, causal, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: instruct\n{line}\n")
    arguments = ["--recipe", str(path), "--model", causal["chat"], "--data", "nowhere"]
    assert told in refused(capsys, tmp_path, arguments)


def test_a_dry_run_of_another_kind_of_model(causal, tmp_path, capsys):
    arguments = ["--recipe", "xsum", "--model", causal["chat"], "--dry-run"]
    assert "--task instruct fits it" in refused(capsys, tmp_path, arguments)


def test_a_quantised_base_under_fsdp(causal, tmp_path, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes")
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    arguments = instruct(causal["chat"], data(tmp_path), "--quantize", "nf4")
    assert "is not sharded: launch with DDP" in refused(capsys, tmp_path, arguments)


def test_a_dry_run_counts_quantised_weights(causal, tmp_path, capsys):
    model = ["--task", "instruct", "--model", causal["chat"], "--max-length", "96", "--dry-run"]
    assert cli.main(["train", *model]) == 0
    told = capsys.readouterr().out
    assert "instruct on" in told and "memory about" in told


def test_a_tokenizer_without_padding_pads_with_its_end_and_says_so(causal, tmp_path, capsys):
    rows = data(tmp_path)
    arguments = instruct(causal["no pad"], rows, "--steps", "1", "--output", str(tmp_path / "out"))
    assert cli.main(["train", *arguments]) == 0
    assert "has no pad token: its end token '</s>' pads" in capsys.readouterr().err


KINDS = {
    SEQ2SEQ: ["bart", "mbart", "t5", "whisper"], ENCODER: ["bert", "roberta", "deberta-v2"],
    CAUSAL: ["llama", "gpt2", "opt", "mistral", "phi3"], OTHER: ["vit"],
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, names in KINDS.items() for name in names]
)
def test_the_kind_of_a_model_is_read_from_its_config(kind, name):
    assert kind_of({**MODELS, **MORE}[name]().config) == kind


def test_every_kind_has_a_task_of_the_users_own_rows():
    found = [fitting_task(kind) for kind in (SEQ2SEQ, ENCODER, CAUSAL)]
    assert found == ["generation", "classification", "instruct"]
