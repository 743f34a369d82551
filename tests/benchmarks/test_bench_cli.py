"""pelt-fast bench as a user calls it, wrong arguments too."""

import json

import pytest

from benchmarks import bench
from tests.benchmarks.command import main

TINY = ["--model", "tiny-bart", "--peer", "pelt_fast", "plain", "--repeats", "1"]
LAYER = ["bench", "layer", *TINY, "--method", "parallel", "--size", "4", "--dropout", "0",
         "--rows", "1", "--length", "16"]  # fmt: skip


@pytest.fixture(autouse=True)
def runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs")


def test_layer_prints_a_table_writes_json_and_draws(tmp_path, capsys, tiny_shapes):
    file, folder = tmp_path / "result.json", tmp_path / "figures"
    assert main([*LAYER, "--json", str(file), "--plot", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "| pelt_fast " in out and "| frozen " in out and str(file) in out
    assert json.loads(file.read_text())["finished"]
    figure = (folder / "layer-tiny-bart-time.svg").read_text()
    assert figure.startswith("<?xml") and "plain PyTorch" in figure


def test_results_are_never_written_over(tmp_path, capsys, tiny_shapes):
    file = tmp_path / "result.json"
    file.write_text("mine")
    assert main([*LAYER, "--json", str(file)]) == 2
    assert "never written over" in capsys.readouterr().err and file.read_text() == "mine"


def test_model_runs(capsys, tmp_path, tiny_shapes):
    assert main(["bench", "model", *TINY, "--method", "lora", "--rows", "2", "--length", "32",
                 "--target", "8"]) == 0  # fmt: skip
    assert "full fine-tuning" not in capsys.readouterr().out  # it was not asked for
    (written,) = (tmp_path / "runs").glob("*-model-tiny-bart.json")
    assert json.loads(written.read_text())["finished"]


@pytest.mark.parametrize("level, more", [
    ("layer", "lora"), ("model", "lora"), ("traffic", None), ("predict", None),
])  # fmt: skip
def test_unknown_names_list_what_exists(level, more, capsys, tmp_path):
    for option, known in (("--method", "lora"), ("--model", "bart-large"), ("--peer", "plain")):
        if more is None and option != "--method":
            continue
        assert main(["bench", level, option, "nope"]) == 2
        error = capsys.readouterr().err
        assert "unknown" in error and "'nope'" in error and known in error
    assert not (tmp_path / "runs").exists()  # nothing was begun


def test_other_bad_input_is_one_clear_line(capsys, tmp_path):
    for arguments, said in (
        (["predict", "--device", "h9"], "unknown device 'h9': choose h200"),
        (["layer", "--device", "tpu"], "--device must be cpu or cuda"),
        (["layer", "--rows", "0"], "--rows must be at least 1, got 0"),
        (["layer", "--size", "4", "0"], "--size must be at least 1, got 0"),
        (["layer", "--dropout", "1.5"], "--dropout must be in [0, 1), got 1.5"),
        (["model", "--share", "-1"], "--share must be above 0, got -1.0"),
        (["model", "--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["model", "--text", "nowhere.txt", "--method", "lora"], "nowhere.txt"),
    ):
        assert main(["bench", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
