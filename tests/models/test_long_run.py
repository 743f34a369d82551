"""A run killed with SIGKILL at random steps ends with the losses of an unbroken one, and memory does
not grow. ``make soak`` runs 2,000 steps (PELT_FAST_LONG), ``make test`` ninety."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pelt_fast.integrations.trainer import last_checkpoint

STEPS = int(os.environ.get("PELT_FAST_LONG", "90"))
KILLS = 2 if STEPS < 1000 else 6
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")


def start(folder: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.models.long_run", str(folder), str(STEPS)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def journal(folder: Path) -> list[dict]:
    path = folder / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=1800)
    assert process.returncode == 0, said.decode()[-2000:]


def kill_at(folder: Path, step: int) -> None:
    """Start, and kill when ``step`` is done; a signal that cannot be caught."""
    process = start(folder)
    while process.poll() is None and max((e["step"] for e in journal(folder)), default=0) < step:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_run_that_is_killed_ends_as_the_unbroken_one(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    other = start(whole)
    draw = random.Random(7)
    for step in sorted(draw.sample(range(5, STEPS - 5), KILLS)):
        kill_at(broken, step)
    finish(start(broken))
    finish(other)
    wanted = {entry["step"]: entry["loss"] for entry in journal(whole)}
    entries = journal(broken)
    assert len(entries) >= len(wanted) == STEPS  # a step between checkpoint and kill ran twice
    assert all(wanted[entry["step"]] == entry["loss"] for entry in entries)
    memory = [entry["memory"] for entry in journal(whole)]
    half = len(memory) // 2
    late, settled = max(memory[-half // 2 :]), max(memory[half // 2 : half])
    assert late <= 1.05 * settled, (settled, late)


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    for step, state in ((10, '{"global_step": 10}'), (20, '{"global_'), (30, None), (9, "{}")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nowhere") is None
