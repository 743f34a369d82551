"""make gpu PART=tune: candidates, their compilation in processes, and the tables that win."""

import json

import pytest
import torch

from benchmarks.gpu import (
    candidates,
    compiling,
    fused,
    measured,
    tune,
)
from benchmarks.gpu.record import Record
from pelt_fast.kernels import config, tuned
from pelt_fast.kernels.tile import Tile
from pelt_fast.kernels.tiles import TABLES

from .tiny import CPU, TINY


def test_every_table_has_a_few_candidates():
    assert set(candidates.FAMILY) == set(candidates.GRIDS) == set(TABLES) | set(config.SHARED)
    for table in candidates.FAMILY:
        tiles = candidates.candidates(table)
        assert 6 <= len(set(tiles)) == len(tiles) <= 24
        assert all(tile.programs == 2 for tile in tiles)
        tried = candidates.variants(table, tiles[0])
        assert len(tried) == (3 if table in candidates.SPLIT else 1)


def test_tables_that_no_run_has_measured_come_first(monkeypatch):
    runs = [{"left": ["b up to 64"], "entries": [{"kernel": k, "tried": []} for k in "ab"]}]
    monkeypatch.setattr(candidates, "paths_of", lambda name: [0])
    monkeypatch.setattr(candidates, "load", lambda path: runs[path])
    assert candidates.in_order("abc") == ["b", "c", "a"]


def test_a_short_prefix_reads_its_own_table_where_that_was_measured(monkeypatch):
    own = {"prefix_short": {"any": ((16, 64, {"block_m": 32}, "measured"),)}}
    monkeypatch.setattr(tuned, "TILES", own)
    config.rows.cache_clear()
    try:
        found = [config.pick(t, 16, 64, CPU) for t in ("prefix_short", "prefix")]
        assert found[0] == Tile(block_m=32) != found[1]
        monkeypatch.setattr(tuned, "TILES", {})
        config.rows.cache_clear()
        assert config.pick("prefix_short", 16, 64, CPU) == config.pick("prefix", 16, 64, CPU)
        with config.forced("prefix", FAST):
            assert config.pick("prefix_short", 16, 64, CPU) == FAST
    finally:
        config.rows.cache_clear()


def test_a_split_aims_at_the_programs_of_the_tile():
    assert config.split(2, 64, CPU) == config.split(2, 64, CPU, 2) == (16, 4)
    assert config.split(2, 64, CPU, 8) == (4, 16)


FAST = Tile(block_m=16, block_n=32, block_k=32, block_r=16, num_warps=4, num_stages=1)


@pytest.fixture
def two_tables(monkeypatch):
    """A short run of tune: two tables, one tile, the kernels at one rank."""
    monkeypatch.setattr(tune, "FAMILY", {"rank_down": "low_rank", "rank_up": "low_rank"})
    monkeypatch.setattr(tune, "candidates", lambda kernel: [FAST])
    monkeypatch.setattr(fused, "RANKS", (16,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_tune_writes_rows_that_the_tables_read(tmp_path, monkeypatch, two_tables):
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(tune, "GAIN", float("inf"))
    monkeypatch.setattr(tune, "milliseconds", lambda function, device: (next(times), 0, 0))
    target, before = tmp_path / "tuned.py", dict(tuned.TILES)
    assert tune.run(Record("tune", tmp_path), CPU, TINY, torch.float16, to=target) == 0
    found: dict = {}
    exec(target.read_text(), found)
    (bits, limit, tile, why), above = found["TILES"]["rank_down"]["any"]
    assert (bits, limit) == (16, 8) and Tile(**tile).programs in (2, 4, 8)
    assert Tile(**tile | {"programs": 2}) == FAST
    assert "R=8 p=0.0" in why and "R=8 p=0.1" in why and "before, on cpu" in why
    assert above[1] == 32 and Tile(**above[2]) == config.pick("rank_down", 16, 32, CPU)
    # the second time is the library's, and shorter
    assert found["FUSED_RANK"]["any"] == dict.fromkeys(config.FUSED_RANK, 0)
    assert before == tuned.TILES and config.fused_rank("rank_up", CPU) == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_a_candidate_that_fails_or_is_wrong_is_left_out(tmp_path, monkeypatch, two_tables):
    bad, wrong = Tile(block_m=3), Tile(block_m=32, block_n=32, block_k=32, block_r=16)
    monkeypatch.setattr(tune, "candidates", lambda kernel: [bad, wrong])
    monkeypatch.setattr(tune, "off", lambda got, want: "output 0 is off")
    record = Record("tune", tmp_path)
    assert tune.run(record, CPU, TINY, torch.float16, to=tmp_path / "tuned.py") == 0
    told = [told for e in record.entries if "tried" in e for _, told in e["tried"]]
    assert told and all(isinstance(each, str) for each in told)
    assert record.result["tiles"] == tuned.TILES


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_tune_lists_what_has_no_time(tmp_path, two_tables):
    record = Record("tune", tmp_path, seconds=0)
    assert tune.run(record, CPU, TINY, torch.float16, to=tmp_path / "tuned.py") == 0
    assert {"rank_down up to 32", "rank_up up to 64"} <= set(record.result["left"])
    assert "adapter against the library at R=16" in record.result["left"]
    assert record.result["tiles"] == tuned.TILES and record.result["fused_rank"] == {
        **tuned.FUSED_RANK, "any": {},
    }  # fmt: skip


def test_the_winner_is_the_best_over_all_cases_of_a_row():
    one, two, three = (Tile(m) for m in (16, 32, 64))
    first = tune.Timed("p=0.0", 16, 1.0, {one: 0.5, two: 0.8, three: 0.1})
    second = tune.Timed("p=0.1", 64, 10.0, {one: 9.9, two: 6.0})
    assert tune.winner([first, second]) == (two, pytest.approx(0.7))
    slow = tune.Timed("p=0.1", 64, 10.0, {one: 20.0, two: 12.0})
    assert tune.winner([first, slow]) == (None, 1.0)


def test_rows_that_stay_are_put_beside_a_winner_of_larger_sizes(tmp_path):
    tuning = tune.Tuning(Record("tune", tmp_path), CPU, TINY, torch.float16)
    stays, wins = (tune.Timed("a", size, 1.0, {FAST: t}) for size, t in ((16, 1.0), (64, 0.5)))
    present = config.pick("rank_down", 16, 16, CPU)
    with tuning.tables.in_use():
        tuning.put_winners("rank_down", {32: [stays], 128: [wins]})
        picked = [config.pick("rank_down", 16, size, CPU) for size in (16, 64, 128)]
    assert picked == [present, FAST, config.pick("rank_down", 16, 128, CPU)]
    tuning.put_winners("rank_up", {64: [wins, None]})
    assert "any" not in tuning.tables["TILES"].get("rank_up", {})


def test_a_limit_of_rank_lies_where_ours_begins_to_lose():
    assert fused.limit({16: 0.5, 64: 0.7, 128: 0.9}, 128) == 128
    assert fused.limit({16: 0.5, 64: 2.0, 128: 4.0}, 128) == 32
    assert fused.limit({16: 1.2, 64: 0.9}, 64) == 0
    assert fused.limit({16: 0.9, 64: 0.9, 128: 8.0}, 128) in range(64, 70)


def test_a_measured_limit_of_rank_is_read_first(monkeypatch):
    assert config.fused_rank("rank_down", CPU) == config.FUSED_RANK["rank_down"]
    tables = measured.Tables()
    tables["FUSED_RANK"]["any"] = {"rank_down": 24}
    with tables.in_use():
        assert config.fused_rank("rank_down", CPU) == 24
        assert config.fused_rank("rank_up", CPU) == config.FUSED_RANK["rank_up"]
    assert config.fused_rank("rank_down", CPU) == config.FUSED_RANK["rank_down"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled there")
def test_a_process_compiles_its_share_and_says_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "FAMILY", {"rank_down": "low_rank"})
    monkeypatch.setattr(compiling, "candidates", lambda table: [FAST, Tile(block_m=3)])
    monkeypatch.setattr(fused, "RANKS", (16,))
    names = [name for name, _ in compiling.work(CPU, TINY, torch.float16)]
    assert len(set(names)) == len(names) == 2 * 3 + 5
    file = tmp_path / "0.jsonl"
    file.write_text(json.dumps([names[0], "started"]) + "\n")  # it ended the process before
    for _ in range(2):
        work = compiling.work(CPU, TINY, torch.float16)
        compiling.compile_share(file, (0, 2), 1e12, work)
    found = compiling.outcomes([file])
    assert list(found) == names[::2] and len(file.read_text().splitlines()) == 1 + 2 * 5
    assert found[names[0]] == "started" and "block_m=3" in names[2]
    assert found[names[2]] not in ("started", "compiled") and found[names[4]] == "compiled"


def test_a_process_that_ends_is_started_again_after_what_ended_it(tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text(
        "import os, sys\nfrom pathlib import Path\nfrom benchmarks.gpu import compiling\n"
        "i, n, until, file = sys.argv[1:]\n"
        "names = {'a': lambda: 1, 'b': lambda: os._exit(5), 'c': lambda: 1 / 0, 'd': lambda: 1}\n"
        "compiling.compile_share(Path(file), (int(i), int(n)), float(until), names.items())\n"
    )
    monkeypatch.setattr(compiling, "PROGRAM", (str(tmp_path / "ends.py"),))
    record = Record("tune", tmp_path)
    with compiling.Compilation(record, 100, count=1) as compilation:
        pass
    found = compilation.outcomes
    assert [found[name] for name in "abd"] == ["compiled", "started", "compiled"]
    assert found["c"].startswith("ZeroDivisionError") and record.entries[0]["compiled"] == 2
    assert [compilation.usable(name) for name in "abe"] == [True, False, False]


def test_where_no_process_runs_everything_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "PROGRAM", ("-c", "raise SystemExit('no context')"))
    record = Record("tune", tmp_path)
    with compiling.Compilation(record, 100, count=1) as compilation:
        pass
    assert compilation.usable("a") and "no context" in record.entries[0]["said"][0]


def test_an_answer_wins_by_two_percent_or_the_present_one_stays():
    assert tune.chosen({"triton": 1.0, "cuda": 0.99}, "triton") == "triton"
    assert tune.chosen({"triton": 1.0, "cuda": 0.97}, "triton") == "cuda"
    assert tune.chosen({"cuda": 0.99}, "triton") == "cuda"


def test_a_table_whose_cases_cannot_be_made_does_not_end_the_others(monkeypatch):
    made, first = compiling.cases_of, candidates.in_order(compiling.FAMILY)[0]

    def broken(table, *rest):
        if table == first:
            raise RuntimeError("no such kernel")
        return made(table, *rest)

    monkeypatch.setattr(compiling, "cases_of", broken)
    names = {}
    for name, function in compiling.work(CPU, TINY, torch.float16):
        names[name] = function
        if len(names) > 3:
            break
    with pytest.raises(RuntimeError, match="no such kernel"):
        names[first]()
