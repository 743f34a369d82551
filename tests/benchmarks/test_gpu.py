"""make gpu: what of it runs without a GPU, runs here on small shapes, kernels interpreted."""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.gpu import kernels, layers, numerics, tune
from benchmarks.gpu.kernel_cases import Sizes, cases
from benchmarks.gpu.record import Record

CPU = torch.device("cpu")
TINY = Sizes(m=24, k=32, inner=40, batch=1, heads=2, queries=12, dim=16, ranks=(8,), prefixes=(5,))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_without_a_part_it_lists_them():
    ran = command()
    assert ran.returncode == 0 and ran.stdout.count("make gpu PART=") == 5


def test_without_a_gpu_it_says_so_and_writes_nothing():
    ran = command("1")
    assert ran.returncode == 2 and "torch sees none" in ran.stderr


def test_an_unknown_part_names_those_there_are():
    ran = command("9")
    assert ran.returncode == 2 and "1, 2, 3, 4, tune" in ran.stderr


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
