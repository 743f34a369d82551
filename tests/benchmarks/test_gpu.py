"""make gpu: what of it runs without a GPU, runs here on small shapes, kernels interpreted."""

import json
import sys

import pytest
import torch

from benchmarks import decode, layer, model, traffic
from benchmarks.common import REPOSITORY
from benchmarks.gpu import __main__ as make_gpu
from benchmarks.gpu import (
    candidates,
    compiling,
    counters,
    decoding,
    fused,
    kernels,
    layers,
    measure,
    measured,
    models,
    numerics,
    peers,
    tune,
)
from benchmarks.gpu.kernel_cases import Sizes, cases
from benchmarks.gpu.record import Record
from pelt_fast.kernels import config, tuned
from pelt_fast.kernels.tiles import TABLES, Tile

from .tiny import bf16

CPU = torch.device("cpu")
TINY = Sizes(m=24, k=32, inner=40, batch=1, heads=2, queries=12, dim=16, ranks=(8,), prefixes=(5,))


@pytest.fixture
def command(monkeypatch, capsys):
    """``make gpu`` without a GPU: its exit status, what it printed and its complaint."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["make gpu", *arguments])
        try:
            code = make_gpu.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def test_without_a_part_it_lists_them(command):
    code, printed, _ = command()
    assert code == 0 and printed.count("make gpu PART=") == 10


def test_without_a_gpu_it_says_so_and_writes_nothing(command):
    code, _, complaint = command("1")
    assert code == 2 and "torch sees none" in complaint


def test_an_unknown_part_names_those_there_are(command):
    code, _, complaint = command("10")
    assert code == 2 and "1, 2, 3, 4, 5, 6, 7, 8, 9, tune" in complaint


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_every_kernel_case_is_right_and_is_written_down(tmp_path):
    record = Record("kernels", tmp_path)
    assert kernels.run(record, CPU, TINY, torch.float16) == 0
    written = json.loads(record.path.read_text())
    assert written["finished"] and len(written["entries"]) > 15 and not written["left"]
    assert {"milliseconds", "floor", "eager", "gb_s"} <= written["entries"][1].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_a_wrong_kernel_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "wrong", lambda case, seed: "off")
    record = Record("kernels", tmp_path)
    assert kernels.run(record, CPU, TINY, torch.float16) == 1
    assert all("milliseconds" not in e for e in json.loads(record.path.read_text())["entries"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_what_does_not_fit_the_time_is_listed(tmp_path):
    record = Record("kernels", tmp_path, seconds=0)
    kernels.run(record, CPU, TINY, torch.float16)
    assert len(json.loads(record.path.read_text())["left"]) > 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_layers_run_with_every_provider(tmp_path):
    record = Record("layers", tmp_path)
    shapes = layers.Layers(
        m=8, k=16, rank=4, ffns=((16, 24),), ffn_rank=8, attention=(1, 2, 8, 8), prefix=3
    )
    assert layers.run(record, CPU, shapes) == 0
    entries = json.loads(record.path.read_text())["entries"]
    assert not [e for e in entries if "failed" in e], entries
    assert {"frozen", "pelt_fast", "concatenation", "plain adapter"} <= {
        e["provider"] for e in entries
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_a_prefix_layer_has_the_layout_of_models():
    shapes = layers.Layers(m=8, k=16, rank=4, ffns=(), attention=(1, 2, 8, 4), prefix=3)
    layer = next(x for x in layers.layers(CPU, shapes, torch.float32) if "prefix" in x.name)
    assert layer.shape == (1, 8, 3, 2, 4)
    x = torch.randn(*layer.shape)
    dy = layers.gradient_of(layer, x)
    assert dy.shape == (1, 8, 2, 4) and dy.is_contiguous()
    ours, other = (layer.providers[name](x) for name in ("pelt_fast", "concatenation"))
    assert ours.shape == dy.shape and torch.allclose(ours, other, atol=1e-5)


def test_device_times_are_what_the_runs_add_to_the_flushes(monkeypatch):
    cold = measure.Cold.__new__(measure.Cold)
    cold.alone = {}
    took = {True: 0.065, False: 0.065 + 0.012}  # milliseconds of one turn: alone, with the function
    monkeypatch.setattr(
        cold, "_captured", lambda f, count: count * took[f.__code__.co_name == "<lambda>"]
    )
    noise = iter(range(100))
    monkeypatch.setattr(cold, "_replay", lambda graph: graph + 1e-3 * (next(noise) % 3))

    def function(): ...

    median, low, high = cold.times(function, once=0.05)
    assert list(cold.alone) == [20] and low <= median <= high
    assert median == pytest.approx(0.012, rel=0.02)
    cold.times(function, once=5.0)
    assert list(cold.alone) == [20, 2]


def test_what_cannot_be_captured_is_timed_from_python(monkeypatch):
    class Fails:
        def warm(self, function):
            return function()

        def times(self, function, once):
            raise RuntimeError("capture")

    made = []
    cold = measure.functools.cache(lambda index: made.append(index) or Fails())
    monkeypatch.setattr(measure, "_cold", cold)
    monkeypatch.setattr(measure, "eager_milliseconds", lambda function, device: (1.0, 0.5, 2.0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu = torch.device("cuda")
    for _ in range(2):
        assert measure.milliseconds(lambda: 0.1, gpu) == (1.0, 0.5, 2.0)
    assert made == [0, 0]  # the pool of a failed capture is not used again
    with pytest.raises(ZeroDivisionError):
        measure.milliseconds(lambda: 1 / 0, gpu)


def test_every_table_has_a_few_candidates():
    assert set(candidates.FAMILY) == set(candidates.GRIDS) == set(TABLES)
    for table in TABLES:
        tiles = candidates.candidates(table)
        assert 6 <= len(set(tiles)) == len(tiles) <= 24
        assert all(tile.programs == 2 for tile in tiles)
        tried = candidates.variants(table, tiles[0])
        assert len(tried) == (3 if table in candidates.SPLIT else 1)


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
    assert "rank_up" not in tuning.tables["TILES"]


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


def test_numerics_collects_the_suite():
    names = numerics.collect()
    assert len(names) > 400 and all(name.startswith("tests/numerics/") for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled there")
def test_cases_count_bytes_of_what_they_touch():
    for case in cases(CPU, TINY, torch.float16):
        assert case.bytes > 0, case


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_models_say_how_far_the_headline_is(tmp_path, capsys, tiny_shapes):
    plan = model.Plan(models=("tiny-bart",), methods=("mam",), rows=2, source=32, target=8,
                      dtype=torch.bfloat16, peers=("full", "pelt_fast", "plain"), repeats=1)  # fmt: skip
    assert models.run(Record("models", tmp_path), CPU, (plan,)) == 0
    assert "tiny-bart MAM: step" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_peers_run_in_bf16(tmp_path, tiny_shapes):
    plan = layer.Plan(("lora", "prefix-causal"), ("tiny-llama",), (4,), (0.0,), repeats=1,
                      peers=("pelt_fast", "plain", "peft", "concatenation", "flex", "unsloth"),
                      setting=bf16())  # fmt: skip
    record = Record("peers", tmp_path)
    assert peers.run(record, CPU, (plan,)) == 0
    timed = {e["provider"] for e in record.entries if "seconds" in e}
    assert {"PEFT", "PEFT, bf16 factors", "plain PyTorch", "concatenation + SDPA"} <= timed
    assert not [e for e in record.entries if "failed" in e or "refused" in e]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_decoding_runs_in_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "BATCHES", (1,))
    monkeypatch.setattr(decode, "METHODS", {"lora": dict()})
    measure = decode.measure
    monkeypatch.setattr(decode, "measure", lambda repeats, *rest: measure(1, *rest))
    record = Record("decoding", tmp_path)
    assert decoding.run(record, CPU) == 0
    assert record.entries[0]["seconds"]["1"].keys() == {"frozen", "lora", "lora merged"}


def test_counters_run_what_is_counted(monkeypatch):
    for name, value in dict(M=32, K=48, N=48, INNER=64, RANK=16).items():
        monkeypatch.setattr(traffic, name, value)
    found = 0
    for i, case in enumerate(traffic.cases(counters.CASES)):
        for name in case.providers.keys() & set(counters.PROVIDERS):
            counters.materialised(i, name, CPU)()
            found += 1
    assert found >= 8


def test_counters_read_what_ncu_prints():
    printed = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","k","dram__bytes_read.sum","byte","1,000"
"0","k","dram__bytes_write.sum","byte","24"
"""
    assert counters.total(printed) == 1024
    with pytest.raises(RuntimeError, match="ERR_NVGPUCTRPERM"):
        counters.total("==ERROR== ERR_NVGPUCTRPERM")


def test_without_ncu_nothing_is_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    record = Record("counters", tmp_path)
    assert counters.run(record, CPU) == 0 and "ncu" in record.result["absent"]


def test_layers_have_their_predictions():
    known = layers.predictions()
    assert known, "pelt-fast bench predict --record"
    assert layers.predicted(known, "LoRA linear 4096 R=16 p=0.1", "plan tail") > 1
    assert (
        layers.predicted(known, "widened FFN 4096/14336 R=512, flop ratio 1.054", "pelt_fast") > 1
    )
    assert layers.predicted(known, "prefix attention B16 H16 S1024 D64 P=30", "concatenation") > 1
    assert layers.predicted(known, "unheard of", "pelt_fast") is None


def test_a_test_that_ends_its_process_is_a_miss_and_the_others_run(tmp_path, monkeypatch):
    (tmp_path / "test_ends.py").write_text(
        "import os\n\ndef test_a(): pass\n\ndef test_b(): os._exit(5)\n\n"
        "def test_c(): assert 1 == 2\n\ndef test_d(): pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(numerics, "REPOSITORY", tmp_path)
    names = [f"test_ends.py::test_{letter}" for letter in "abcd"]
    worker = numerics.Worker(names, tmp_path / "0.jsonl")
    numerics._watch(Record("numerics", tmp_path), [worker])
    found = {r["test"][-1]: r for r in worker.reports()}
    assert [found[letter]["outcome"] for letter in "acd"] == ["passed", "failed", "passed"]
    assert "assert 1 == 2" in found["c"]["message"] and found["b"]["outcome"] == "failed"


def test_an_answer_wins_by_two_percent_or_the_present_one_stays():
    assert tune.chosen({"triton": 1.0, "cuda": 0.99}, "triton") == "triton"
    assert tune.chosen({"triton": 1.0, "cuda": 0.97}, "triton") == "cuda"
    assert tune.chosen({"cuda": 0.99}, "triton") == "cuda"


def test_a_table_whose_cases_cannot_be_made_does_not_end_the_others(monkeypatch):
    made = compiling.cases_of

    def broken(table, *rest):
        if table == next(iter(compiling.FAMILY)):
            raise RuntimeError("no such kernel")
        return made(table, *rest)

    monkeypatch.setattr(compiling, "cases_of", broken)
    names = {}
    for name, function in compiling.work(CPU, TINY, torch.float16):
        names[name] = function
        if len(names) > 3:
            break
    first = next(iter(compiling.FAMILY))
    with pytest.raises(RuntimeError, match="no such kernel"):
        names[first]()
