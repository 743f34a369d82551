"""A doubtful measurement says so, and is not recorded."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks import doubts
from benchmarks.record import Record


def test_others_at_work_are_seen():
    if doubts.busy_cores(0.1) is None:
        pytest.skip("this system does not say what its cores do")
    code = "import time; end = time.time() + 60\nwhile time.time() < end: pass"
    busy = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.5)  # they start
        assert doubts.busy_cores(1.0) > doubts.MOST_BUSY * (os.cpu_count() or 1)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_what_is_said_of_a_load():
    assert doubts.loaded(None) is None and doubts.loaded(0.4, cores=2) is None
    assert doubts.loaded(1.26, cores=2) == "other processes keep 1.3 of 2 cores busy"


def test_what_is_said_of_a_spread():
    steady = [dict(provider="frozen", seconds=[1.0, 1.05, 1.1])]
    assert doubts.spread(steady, ("frozen",)) is None and doubts.spread([], ("frozen",)) is None
    assert doubts.spread([dict(provider="ours", seconds=[1.0, 2.0])], ()) is None
    wide = [
        dict(provider="frozen", seconds=[1.0, 1.0, 2.0, 2.0]),
        dict(provider="ours", seconds=[1.0]),
    ]
    assert (
        doubts.spread(wide, ("frozen",))
        == "the middle half of the floor's times spreads over 67% of their median"
    )


def test_a_changed_tree_is_named(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    assert doubts.uncommitted(tmp_path / "none") == []
    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one")
    (tmp_path / "new.json").write_text("{}")
    assert doubts.uncommitted(tmp_path) == []
    (tmp_path / "a.py").write_text("2")
    assert doubts.uncommitted(tmp_path) == ["a.py"]


@pytest.mark.parametrize("changed, busy, said", [
    (["a.py"], 0.0, r"--record needs a committed tree; these files have changed: a\.py"),
    ([], 64.0, "--record needs a quiet machine, but other processes keep 64.0 of"),
])  # fmt: skip
def test_nothing_is_recorded_then(monkeypatch, tmp_path, changed, busy, said):
    monkeypatch.setattr(doubts, "uncommitted", lambda: changed)
    monkeypatch.setattr(doubts, "busy_cores", lambda: busy)
    with pytest.raises(ValueError, match=said):
        Record("subject")
    Record("subject", tmp_path)  # a folder of one's own is for any measurement
