"""pelt-fast bench from the command line: the checkout's benchmarks in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pelt_fast
from pelt_fast import cli
from pelt_fast.cli import bench

CHECKOUT = Path(pelt_fast.__file__).parents[1]


def command(*arguments, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pelt_fast", "bench", *arguments], cwd=folder, text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    )  # fmt: skip


def test_help_tells_every_option(tmp_path):
    ran = command("--help", folder=tmp_path)
    assert ran.returncode == 0 and not ran.stderr
    assert ran.stdout.startswith("usage: pelt-fast bench [-h] [--quick]")
    for said in ("layer", "traffic", "--share PERCENT", "default: all; frozen is always in"):
        assert said in ran.stdout


def test_bad_input_is_one_line_and_status_2_from_any_folder(tmp_path):
    (tmp_path / "benchmarks").mkdir()  # a folder of the user's, which is not ours
    ran = command("layer", "--rows", "0", folder=tmp_path)
    assert (ran.returncode, ran.stderr) == (
        2,
        "pelt-fast bench: --rows must be at least 1, got 0\n",
    )


def test_without_a_checkout_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "_CHECKOUT", tmp_path)
    for arguments in (["bench", "layer"], ["bench", "--help"]):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert "not part of the installed package" in error and error.count("\n") == 1
