"""Every task from its rows to a row of results; interrupted and resumed; the CLI on top."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import pelt_fast
from pelt_fast import cli
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.batches import LengthBatches
from pelt_fast.tasks.estimate import estimate
from pelt_fast.tasks.meter import LOG
from pelt_fast.tasks.optimizer import parameter_groups
from pelt_fast.tasks.recipe import Recipe
from pelt_fast.tasks.run import run
from tests.models.test_parity import small_method
from tests.small import roberta
from tests.tasks.conftest import SAMPLES

SHORT = dict(
    steps=6, batch_size=4, batch_tokens=0, accumulation=1, max_length=128, max_target=40, beams=2,
    min_generated=0, max_generated=12, evaluate_every=3, eval_batch_size=4, learning_rate=5e-3,
    precision="fp32", model_config={},
)  # fmt: skip
SCORES = {
    "sst2": {"accuracy"}, "mnli": {"matched", "mismatched"},
    "xsum": {"rouge1", "rouge2", "rougeL", "loss"},
    "wmt16": {"bleu", "bleu_normalised", "loss"},
}  # fmt: skip


def short(name: str, models: dict, **changes) -> Recipe:
    found = recipes.load(name)
    small = {"sizes": {m.form: {"size": 4} for m in found.config().modifications if m.size}}
    return found.replace(**{**SHORT, **small, "model": models[found.task], **changes})


@pytest.mark.parametrize("name", ["sst2", "mnli-lora", "xsum", "wmt16-pfeiffer", "xsum-full"])
def test_a_recipe_runs_from_rows_to_results(name, models, tmp_path):
    recipe = short(name, models)
    row = run(recipe, SAMPLES / recipe.task, tmp_path / "out", quiet=True,
              results=tmp_path / "results.jsonl")  # fmt: skip
    assert row["metrics"].keys() == SCORES[recipe.task]
    scores = [score for name, score in row["metrics"].items() if name != "loss"]
    assert all(0 <= score <= 100 for score in scores)
    assert row["step_seconds"] > 0 and row["peak_bytes"] > 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == json.loads(json.dumps(row))
    logged = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert any("eval_loss" in entry for entry in logged)
    assert (tmp_path / "out" / "pelt_config.json").is_file()


def test_a_translation_is_learned_by_heart(models, tmp_path):
    """Words come out, and the right ones: source, target, start token and decoding fit together."""
    rows = SAMPLES / "wmt16"
    for language in ("en", "ro"):
        text = (rows / f"train.{language}").read_text().splitlines()[:4]
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.{language}").write_text("\n".join(text) + "\n")
    recipe = short("wmt16-full", models, steps=250, evaluate_every=250, learning_rate=1e-2,
                   schedule="constant", label_smoothing=0.0)  # fmt: skip
    row = run(recipe, tmp_path, tmp_path / "out", quiet=True, results=tmp_path / "r.jsonl")
    assert row["metrics"]["bleu"] > 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes what the recipe says")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cpu_takes_bf16_where_it_multiplies_in_it_and_else_says_fp32(
    precision, models, tmp_path, capsys, monkeypatch
):
    native = precision == "bf16" and torch.cpu._is_avx512_bf16_supported()
    trained, there = [], roberta.__globals__["RobertaForSequenceClassification"]
    forward = there.forward

    @functools.wraps(forward)  # Trainer asks for its arguments' names
    def watched(self, *args, **kwargs):
        trained.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(there, "forward", watched)
    run(short("sst2-lora", models, precision=precision, steps=2), SAMPLES / "sst2", tmp_path / "a",
        results=tmp_path / "r")  # fmt: skip
    assert trained and set(trained) == {native}
    told = f"precision {precision} is not for this CPU: training in fp32"
    assert (told in capsys.readouterr().err) == (precision != "fp32" and not native)


@pytest.mark.parametrize("warmup", [0.06, 1, 0.0])
def test_a_run_of_one_step(warmup, models, tmp_path):
    recipe = short("xsum-lora", models, steps=1, warmup=warmup, evaluate_every=1)
    row = run(recipe, SAMPLES / "xsum", tmp_path / "a", quiet=True, results=tmp_path / "r")
    assert row["steps"] == 1


@pytest.mark.parametrize("name", ["sst2", "wmt16"])
def test_interrupted_and_resumed_gives_the_same_numbers(name, models, tmp_path, monkeypatch):
    tokens = {"batch_tokens": 64, "batch_size": 1} if name == "wmt16" else {}
    recipe = short(name, models, steps=10, evaluate_every=2, **tokens)
    whole = run(recipe, SAMPLES / name, tmp_path / "a", quiet=True, results=tmp_path / "r")

    class Stopped(Exception):
        pass

    batches = LengthBatches._drawn
    from pelt_fast.tasks.meter import Meter

    callback = Meter.callback

    def cut(self, folder):
        clock = callback(self, folder)
        begin = clock.on_step_begin

        def stop(arguments, state, *rest, **more):
            if state.global_step == 5:
                raise Stopped
            begin(arguments, state, *rest, **more)

        clock.on_step_begin = stop
        return clock

    monkeypatch.setattr(Meter, "callback", cut)
    with pytest.raises(Stopped):
        run(recipe, SAMPLES / name, tmp_path / "b", quiet=True, results=tmp_path / "r")
    monkeypatch.setattr(Meter, "callback", callback)
    again = run(recipe, SAMPLES / name, tmp_path / "b", resume=True, quiet=True,
                results=tmp_path / "r")  # fmt: skip
    assert again["metrics"] == whole["metrics"]
    assert LengthBatches._drawn is batches

    def evaluations(folder):
        logged = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        return {e["step"]: e["eval_loss"] for e in logged if "eval_loss" in e}

    assert evaluations(tmp_path / "a") == evaluations(tmp_path / "b")


def test_train_on_the_command_line(models, tmp_path, capsys):
    arguments = ["train", "--recipe", "xsum-lora", "--data", str(SAMPLES / "xsum"), "--model",
                 models["xsum"], "--steps", "4", "--evaluate-every", "2", "--beams", "1",
                 "--max-length", "128", "--max-target", "40", "--max-generated", "10",
                 "--min-generated", "0", "--accumulation", "1", "--batch-size", "2", "--output",
                 str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "rouge2" in printed and "curves.svg" in printed
    assert (tmp_path / "out" / "curves.svg").is_file()
    model = roberta  # the saved method goes onto a fresh base
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(models["xsum"])
    pelt_fast.load(model, tmp_path / "out")


def test_a_dry_run_says_what_it_needs_and_trains_nothing(models, tmp_path, capsys):
    arguments = ["train", "--recipe", "xsum", "--model", models["xsum"], "--dry-run", "--device",
                 "a100", "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "memory about" in printed and "on a a100, 100,000 steps" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["full", "lora", "mam_glue", "prefix"])
def test_every_trainable_parameter_is_in_one_group(method):
    model = pelt_fast.inject(roberta(), small_method(method))
    recipe = recipes.load("classification").replace(learning_rate=1e-2, weight_decay=0.1)
    groups = parameter_groups(model, recipe)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(trainable) and set(grouped) == trainable
    slow = {id(p) for g in groups if g["lr"] == pytest.approx(2e-3) for p in g["params"]}
    bank = getattr(model.roberta.encoder, "pelt_encoder_prefix", None)
    assert slow == ({id(p) for p in bank.parameters()} if bank is not None else set())
    decayed = [p for g in groups if g["weight_decay"] for p in g["params"]]
    assert all(p.dim() > 1 for p in decayed)


def bad(models, tmp_path) -> list:
    empty = tmp_path / "empty"
    empty.mkdir()
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "train.csv").write_text("words,label\na,1\n")
    (wrong / "dev.csv").write_text("words,label\na,1\n")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "train.csv").write_text("text,label\na,1\nb,0\n")
    (strange / "dev.csv").write_text("text,label\na,7\n")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "train.csv").write_text("text,label\na,1\nb,0\n")
    (bare / "dev.csv").write_text("text,label\n")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "train.jsonl").write_text('{"text": "a", "label"')
    (broken / "dev.jsonl").write_text('{"text": "a", "label": 1}\n')
    uneven = tmp_path / "uneven"
    uneven.mkdir()
    for split in ("train", "dev"):
        (uneven / f"{split}.en").write_text("one\ntwo\n")
        (uneven / f"{split}.ro").write_text("unu\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: sst2\nlerning_rate: 0.1\n")
    numbers = tmp_path / "numbers.yaml"
    numbers.write_text("extends: sst2\nsteps: many\n")
    sst2 = ["--recipe", "sst2", "--model", models["sst2"], "--max-length", "64"]
    return [
        ([*sst2, "--data", str(tmp_path / "nowhere")], "nowhere is not a folder"),
        ([*sst2, "--data", str(empty)], "has no train split"),
        ([*sst2, "--data", str(wrong)], "needs a column text or sentence"),
        ([*sst2, "--data", str(strange)], "label '7' of validation is none of negative, positive"),
        ([*sst2, "--data", str(bare)], "dev.csv is empty"),
        ([*sst2, "--data", str(broken)], "train.jsonl cannot be read"),
        (["--recipe", "wmt16", "--model", models["wmt16"], "--data", str(uneven)],
         "train.en has 2 lines, train.ro 1"),
        (["--recipe", "sst3", "--data", str(empty)], "did you mean 'sst2'"),
        (["--recipe", "xsum-mamm", "--data", str(empty)], "did you mean 'xsum-mam'"),
        (["--recipe", str(recipe), "--data", str(empty)], "did you mean 'learning_rate'"),
        (["--recipe", str(numbers), "--data", str(empty)], "steps must be a number, got 'many'"),
        (["--recipe", str(tmp_path / "no.yaml")], "no.yaml is not there"),
        (["--recipe", "sst2", "--model", models["sst2"], "--data", str(SAMPLES / "sst2")],
         "max_length=512 is longer than the 128 positions"),
        ([*sst2, "--data", str(SAMPLES / "sst2"), "--batch-size", "99999999"],
         "this recipe needs about"),
        ([*sst2, "--data", str(SAMPLES / "sst2"), "--learning-rate", "7"],
         "learning_rate must be in (0, 1), got 7"),
        ([], "--recipe NAME, --task NAME or --data FOLDER is needed"),
    ]  # fmt: skip


def test_bad_input_is_one_clear_line_and_nothing_is_written(models, tmp_path, capsys):
    for arguments, message in bad(models, tmp_path):
        output = tmp_path / "never"
        assert cli.main(["train", *arguments, "--output", str(output)]) == 2, arguments
        captured = capsys.readouterr()
        assert message in captured.err, (arguments, captured.err)
        assert captured.err.strip().count("\n") == 0, captured.err
        assert not output.exists()


def test_a_tokenizer_without_padding_is_named(models, tmp_path, capsys):
    shutil.copytree(models["sst2"], tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "model" / name
        if path.is_file():
            found = {k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}
            path.write_text(json.dumps(found))
    arguments = ["train", "--recipe", "sst2", "--model", str(tmp_path / "model"), "--data",
                 str(SAMPLES / "sst2"), "--max-length", "64"]  # fmt: skip
    assert cli.main(arguments) == 2
    assert "has no pad token" in capsys.readouterr().err


def test_a_full_disk_is_said_before_training(models, tmp_path, monkeypatch):
    from pelt_fast.tasks import run as module

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="the checkpoints of this run take about"):
        run(short("sst2", models), SAMPLES / "sst2", tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_batches_are_of_like_length_within_the_budget_and_new_every_epoch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (500,), generator=generator).tolist()
    batches = LengthBatches(lengths, batch_tokens=256, seed=3)
    first = list(batches)
    assert sorted(row for batch in first for row in batch) == list(range(500))
    sizes = [max(lengths[row] for row in batch) * len(batch) for batch in first]
    assert max(sizes) <= 256
    padded, held = sum(sizes), sum(lengths)
    assert padded < 1.15 * held
    batches.set_epoch(1)
    assert list(batches) != first
    batches.set_epoch(0)
    assert list(batches) == first
    assert len(LengthBatches(lengths, batch_size=7, multiple=4)) % 4 == 0
    with pytest.raises(ValueError, match="batch_tokens=20 holds no row of 59 tokens"):
        LengthBatches(lengths, batch_tokens=20)


def test_two_processes_train_and_the_first_writes(models, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
        "pelt_fast", "train", "--recipe", "sst2-lora", "--data", str(SAMPLES / "sst2"), "--model",
        models["sst2"], "--steps", "4", "--batch-size", "4", "--max-length", "64",
        "--evaluate-every", "2", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["metrics"].keys() == {"accuracy"}
    assert done.stdout.count("saved to") == 1
    assert (tmp_path / "out" / "pelt_config.json").is_file()
    logged = [json.loads(line) for line in (tmp_path / "out" / LOG).read_text().splitlines()]
    assert logged[-1]["epoch"] == 2 * 4 * 4 / row["rows"], "each has its share of the rows"
    assert logged[-1]["train_loss"] < 1, "a mean of both, not their sum"


@pytest.mark.parametrize("name", ["sst2", "wmt16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_accumulated_batches_is_their_mean(name, smoothing, models, tmp_path):
    given = dict(steps=2, evaluate_every=2, label_smoothing=smoothing)
    losses = []
    for accumulation in (1, 4):
        recipe = short(name, models, accumulation=accumulation, **given)
        folder = tmp_path / str(accumulation)
        run(recipe, SAMPLES / recipe.task, folder, quiet=True, results=tmp_path / "r.jsonl")
        logged = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        losses.append(logged[-1]["train_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_loss_that_diverges_is_said_and_no_result_is_kept(models, tmp_path):
    recipe = short("sst2-lora", models, learning_rate=0.9, max_grad_norm=1e30, precision="fp32",
                   schedule="constant", steps=40, evaluate_every=40)  # fmt: skip
    recipe = recipe.replace(sizes={"low_rank": {"size": 4, "scale": 3e38}})
    with pytest.raises(RuntimeError, match="take a smaller learning_rate"):
        run(recipe, SAMPLES / "sst2", tmp_path / "out", quiet=True, results=tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_estimate_counts_every_weight_once(method):
    """2 forward, 2 backward to the input, 2 more where a weight trains."""
    recipe = recipes.load("sst2").replace(method=method, sizes={}, batch_size=4, max_length=64)
    model = pelt_fast.inject(roberta(), small_method(method))
    base = sum(p.numel() for n, p in model.named_parameters() if "pelt_" not in n)
    own = sum(p.numel() for n, p in model.named_parameters() if "pelt_" in n)
    wanted = 6 * base if method == "full" else 4 * base + 6 * own
    assert estimate(model, recipe).flops == 4 * 64 * wanted
