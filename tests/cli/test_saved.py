"""merge, export and generate on methods that were saved, as a user runs them."""

import copy
import io
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

import pelt_fast
from pelt_fast import cli
from pelt_fast.testing import compare
from tests.models.test_parity import small_method
from tests.small import bart, randomise, roberta
from tests.tasks import chat

CLASSES = {
    "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM,
    "classifier": AutoModelForSequenceClassification,
}  # fmt: skip
LABELS = {0: "down", 1: "level", 2: "up"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    found = {"causal": chat.model_folder(root / "causal")}
    own = chat.tokenizer()
    size = dict(vocab_size=len(own), max_position_embeddings=130, bos_token_id=0, eos_token_id=2)
    for name, model in (
        ("seq2seq", bart(**size, decoder_start_token_id=2)),
        ("classifier", roberta(**size)),
    ):
        model.save_pretrained(root / name)
        own.save_pretrained(root / name)
        found[name] = str(root / name)
    return found


def saved(kind: str, method: str, bases: dict, folder):
    """A model with a random method, in evaluation mode, and the folder where the method is."""
    options = dict(num_labels=3, id2label=LABELS) if kind == "classifier" else {}
    model = CLASSES[kind].from_pretrained(bases[kind], **options)
    torch.manual_seed(1)
    randomise(pelt_fast.inject(model, small_method(method)))
    pelt_fast.save(model, folder)
    return model.eval(), str(folder)


def logits(model) -> torch.Tensor:
    ids = torch.arange(8, 40).reshape(2, 16)
    with torch.no_grad():
        return model(input_ids=ids).logits


def assert_within_budget(other, model) -> None:
    """Another model's logits are about as near to those of the model in fp64 as its own are."""
    exact = logits(copy.deepcopy(model).double())
    verdict = compare(
        {"logits": logits(other)}, {"logits": logits(model)}, {"logits": exact}, torch.float32
    )
    assert verdict.ok, verdict


@pytest.mark.parametrize("kind", CLASSES)
def test_merge_writes_a_plain_model_that_answers_alike(kind, bases, tmp_path, capsys):
    model, folder = saved(kind, "lora", bases, tmp_path / "method")
    assert (
        cli.main(["merge", folder, "--model", bases[kind], "--output", str(tmp_path / "out")]) == 0
    )
    assert "folded in" in capsys.readouterr().out
    plain = CLASSES[kind].from_pretrained(tmp_path / "out").eval()
    assert not any("pelt" in name for name, _ in plain.named_modules())
    assert_within_budget(plain, model)
    if kind == "classifier":
        assert plain.config.id2label == LABELS
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_merge_of_what_trained_the_base_itself(method, bases, tmp_path):
    model, folder = saved("classifier", method, bases, tmp_path / "method")
    assert cli.main(["merge", folder, "--output", str(tmp_path / "out")]) == 0
    plain = CLASSES["classifier"].from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("method, told", [
    ("prefix", "a prefix is not linear and stays beside its base"),
    ("mam", "a prefix is not linear"),
    ("pfeiffer", "cannot be folded whole: bottleneck on this place is not linear"),
])  # fmt: skip
def test_merge_refuses_what_no_weight_can_hold(method, told, bases, tmp_path, capsys):
    _, folder = saved("causal", method, bases, tmp_path / "method")
    assert cli.main(["merge", folder, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_merge_does_not_write_over_what_is_there(bases, tmp_path, capsys):
    _, folder = saved("causal", "lora", bases, tmp_path / "method")
    assert cli.main(["merge", folder, "--output", folder]) == 2
    assert "is there already and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["peft", "adapterhub"])
def test_export_does_not_write_over_what_is_there(to, bases, tmp_path, capsys):
    _, folder = saved("seq2seq", "lora", bases, tmp_path / "method")
    before = sorted(path.name for path in (tmp_path / "method").iterdir())
    assert cli.main(["export", folder, "--to", to, "--output", folder]) == 2
    assert "is there already and is not empty" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "method").iterdir()) == before


def test_export_to_peft_is_read_by_peft(bases, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    model, folder = saved("causal", "lora", bases, tmp_path / "method")
    assert cli.main(["export", folder, "--to", "peft", "--output", str(tmp_path / "out")]) == 0
    base = AutoModelForCausalLM.from_pretrained(bases["causal"])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert_within_budget(theirs, model)


def test_export_to_adapterhub_is_read_again(bases, tmp_path):
    model, folder = saved("seq2seq", "lora", bases, tmp_path / "method")
    arguments = [
        "export",
        folder,
        "--to",
        "adapterhub",
        "--name",
        "mine",
        "--output",
        str(tmp_path / "out"),
    ]
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["name"] == "mine"
    base = AutoModelForSeq2SeqLM.from_pretrained(bases["seq2seq"])
    pelt_fast.load_adapterhub(base, tmp_path / "out")
    assert torch.equal(logits(base.eval()), logits(model))


def test_export_says_what_a_format_cannot_hold(bases, tmp_path, capsys):
    _, folder = saved("causal", "mam", bases, tmp_path / "method")
    assert cli.main(["export", folder, "--to", "peft", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_generate_answers_prompts_and_lines(bases, tmp_path, capsys, monkeypatch):
    _, folder = saved("causal", "lora", bases, tmp_path / "method")
    arguments = ["generate", folder, "--max-new-tokens", "5"]
    assert cli.main([*arguments, "--prompt", "one", "two"]) == 0
    told = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == told
    assert cli.main([*arguments, "--plain", "--prompt", "one", "two"]) == 0
    assert capsys.readouterr().out != told


def test_generate_with_an_encoder_decoder(bases, tmp_path, capsys):
    model, folder = saved("seq2seq", "prefix", bases, tmp_path / "method")
    arguments = ["generate", folder, "--plain", "--max-new-tokens", "5", "--prompt", "abc"]
    assert cli.main(arguments) == 0
    own = chat.tokenizer()
    ids = model.generate(
        **own("abc", return_tensors="pt", return_token_type_ids=False),
        max_new_tokens=5,
        num_beams=1,
        do_sample=False,
    )
    assert own.decode(ids[0], skip_special_tokens=True) == capsys.readouterr().out.strip("\n")


@pytest.mark.parametrize("arguments, told", [
    (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    (["--temperature", "-1"], "--temperature must be a number >= 0, got -1"),
    (["--model", "nowhere"], "nowhere"),
    (["--plain", "--prompt", ""], "--prompt: '' has no tokens to go on from"),
])  # fmt: skip
def test_generate_refuses(arguments, told, bases, tmp_path, capsys):
    _, folder = saved("causal", "lora", bases, tmp_path / "method")
    assert cli.main(["generate", folder, "--prompt", "a", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_generate_ends_where_the_model_or_the_tokenizer_does(bases, tmp_path, capsys):
    """An answer ends at the tokenizer's end token too, where the model knows of another one."""
    model, folder = saved("causal", "lora", bases, tmp_path / "method")
    own = chat.tokenizer()
    ids = own("abc", return_tensors="pt", return_token_type_ids=False)
    free = model.generate(**ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    said = free[0, 3:].tolist()
    own.eos_token = own.convert_ids_to_tokens(said[2])
    own.save_pretrained(bases["causal"])
    try:
        arguments = ["generate", folder, "--plain", "--max-new-tokens", "5", "--prompt", "abc"]
        assert cli.main(arguments) == 0
    finally:
        chat.tokenizer().save_pretrained(bases["causal"])
    first = said.index(said[2])
    found = capsys.readouterr().out.strip("\n")
    assert found == own.decode(said[:first], skip_special_tokens=True).strip("\n")


def test_a_classifier_does_not_generate(bases, tmp_path, capsys):
    _, folder = saved("classifier", "lora", bases, tmp_path / "method")
    assert cli.main(["generate", folder, "--prompt", "a"]) == 2
    assert "does not generate" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["merge"], ["export", "--to", "peft"], ["generate"]])
def test_a_folder_without_a_method_is_named(command, tmp_path, capsys):
    more = [] if command[0] == "generate" else ["--output", str(tmp_path / "out")]
    assert cli.main([command[0], str(tmp_path / "nothing"), *command[1:], *more]) == 2
    assert "no saved method in" in capsys.readouterr().err


def test_a_file_of_before_the_class_was_written(bases, tmp_path):
    _, folder = saved("causal", "lora", bases, tmp_path / "method")
    path = tmp_path / "method" / "pelt_config.json"
    described = json.loads(path.read_text())
    del described["base"]["class"]
    path.write_text(json.dumps(described))
    assert cli.main(["merge", folder, "--output", str(tmp_path / "out")]) == 0
