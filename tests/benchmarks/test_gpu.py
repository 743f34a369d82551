"""make gpu: what of it runs without a GPU, runs here on small shapes, kernels interpreted."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import decode, layer, model, traffic
from benchmarks.common import REPOSITORY
from benchmarks.gpu import counters, decoding, kernels, layers, models, numerics, peers, tune
from benchmarks.gpu.kernel_cases import Sizes, cases
from benchmarks.gpu.record import Record

from .tiny import bf16

CPU = torch.device("cpu")
TINY = Sizes(m=24, k=32, inner=40, batch=1, heads=2, queries=12, dim=16, ranks=(8,), prefixes=(5,))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_without_a_part_it_lists_them():
    ran = command()
    assert ran.returncode == 0 and ran.stdout.count("make gpu PART=") == 10


def test_without_a_gpu_it_says_so_and_writes_nothing():
    ran = command("1")
    assert ran.returncode == 2 and "torch sees none" in ran.stderr


def test_an_unknown_part_names_those_there_are():
    ran = command("10")
    assert ran.returncode == 2 and "1, 2, 3, 4, 5, 6, 7, 8, 9, tune" in ran.stderr


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
def test_tune_writes_rows_that_the_tables_read(tmp_path, monkeypatch):
    fast = tune.Tile(block_m=16, block_n=32, block_k=32, block_r=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(tune, "candidates", lambda kernel: [fast])
    monkeypatch.setattr(tune, "GAIN", float("inf"))
    times = iter(range(1000, 0, -1))
    monkeypatch.setattr(tune, "milliseconds", lambda function, device: (next(times), 0, 0))
    target = tmp_path / "tuned.py"
    tune.run(Record("tune", tmp_path), CPU, TINY, torch.float16, to=target)
    found: dict = {}
    exec(target.read_text(), found)
    bits, limit, tile, why = found["TILES"]["rank_down"]["any"][0]
    assert (bits, tune.Tile(**tile)) == (16, fast) and limit >= 8 and "rank" not in tile and why


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
            if case.subject.startswith("widened") and name == "kernels":
                continue  # its sizes are defaults, bound before
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
