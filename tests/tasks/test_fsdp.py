"""`pelt-fast train` under accelerate's FSDP2, two processes: the losses of DDP, resumed, and a
method that a plain model takes."""

import json

import pytest

import pelt_fast
from pelt_fast import cli
from pelt_fast.integrations.trainer import PeltTrainer
from pelt_fast.tasks.loading import load_model
from pelt_fast.tasks.meter import LOG
from tests.tasks.conftest import SAMPLES
from tests.tasks.test_train import short
from tests.tasks.two_processes import fsdp2, run


def trained(folder, models, environment: dict, *more: str) -> list[float]:
    arguments = ["train", "--recipe", "sst2-mam_glue", "--data", str(SAMPLES / "sst2"), "--model",
                 models["sst2"], "--steps", "4", "--batch-size", "4", "--max-length", "64",
                 "--evaluate-every", "2", "--output", str(folder), *more]  # fmt: skip
    run(PeltTrainer, environment, arguments)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_fsdp2_trains_as_ddp_resumes_and_saves_the_method_alone(models, tmp_path, monkeypatch):
    wanted = trained(tmp_path / "ddp", models, {})
    found = trained(tmp_path / "fsdp", models, fsdp2("RobertaLayer"))
    assert len(found) == 2 and found == pytest.approx(wanted, rel=1e-5)
    last = tmp_path / "fsdp/checkpoint-4"
    written = {path.name for path in last.iterdir()}
    assert {"pelt_model.safetensors", "pelt_training.safetensors", "scheduler.pt"} <= written
    assert not any(name.startswith(("model", "pytorch_model")) for name in written)
    (last / "trainer_state.json").write_text("{")  # cut short
    again = trained(tmp_path / "fsdp", models, fsdp2("RobertaLayer"), "--resume")
    assert again[:2] == found and again[2:] == found[1:]
    plain, _ = load_model(short("sst2", models), ("0", "1"))
    pelt_fast.load(plain, tmp_path / "fsdp")


def test_fsdp_1_is_refused_with_the_way_out(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = ["train", "--recipe", "sst2-lora", "--data", str(SAMPLES / "sst2"), "--model",
                 models["sst2"], "--output", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(arguments) == 2
    assert "launch with --fsdp_version 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
