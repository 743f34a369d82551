"""make gpu: what of it runs without a GPU, runs here on small shapes, kernels interpreted."""

import json
import sys

import pytest
import torch

from benchmarks import decode, host, layer, model, traffic
from benchmarks.common import REPOSITORY
from benchmarks.gpu import __main__ as make_gpu
from benchmarks.gpu import (
    counters,
    decoding,
    kernels,
    layers,
    measure,
    models,
    numerics,
    peers,
)
from benchmarks.gpu.kernel_cases import cases
from benchmarks.gpu.record import Record
from tests.numerics.judge import check

from .tiny import CPU, TINY, bf16


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
    assert code == 0 and printed.count("make gpu PART=") == 11


def test_without_a_gpu_it_says_so_and_writes_nothing(command):
    code, _, complaint = command("1")
    assert code == 2 and "torch sees none" in complaint


def test_an_unknown_part_names_those_there_are(command):
    code, _, complaint = command("10")
    assert code == 2 and "1, 2, 3, 4, 5, 6, 7, 8, 9, host, tune" in complaint


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
    assert ours.shape == dy.shape
    check(ours, other, layer.providers["concatenation"](x.double()), torch.float32)


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


def test_numerics_begins_with_what_waits_longest(monkeypatch):
    runs = [  # the newest first
        dict(left=["never", "slow", "once"], entries=[dict(test="missed", outcome="failed")]),
        dict(left=["never", "slow"], entries=[dict(test="mended", outcome="failed")]),
        dict(left=["never", "once"], entries=[]),
    ]
    monkeypatch.setattr(numerics, "paths_of", lambda name: range(3))
    monkeypatch.setattr(numerics, "load", lambda path: runs[path])
    waiting = numerics._waiting()
    order = ["missed", "never", "slow", "once"]
    assert sorted(["once", "never", "missed", "slow"], key=lambda name: -waiting[name]) == order
    assert waiting["mended"] == waiting["passed"] == 0


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
    monkeypatch.setattr(decode, "STEPS", 2)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real parts run there")
def test_the_host_s_time_of_every_call_is_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "LOOPS", 1)
    monkeypatch.setattr(host, "REPEATS", 1)
    record = Record("host", tmp_path)
    assert host.run(record, CPU) == 0
    timed = [e for e in record.entries if "call" in e]
    ops = {"LoRA linear", "prefix attention", "widened FFN"}
    assert {e["call"] for e in timed} >= {*ops, "attention"}
    assert all(e[name] > 0 for e in timed for name in ("inference", "both", "one_thread"))
    profiles = {e["profile"]: e["functions"] for e in record.entries if "profile" in e}
    assert set(profiles) == ops
    for functions in profiles.values():  # with backward, in this thread
        assert any(place.endswith(" backward") and count >= 1 for place, count, *_ in functions)
        assert any("_backward_" in place for place, *_ in functions)
    assert capsys.readouterr().out.count("LoRA linear") == 3
