"""Layers: everybody is right before anybody is timed, and what is not timed says why."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import layer, peers
from benchmarks.common import REPOSITORY
from benchmarks.problems import Absent, Judge, Provider
from benchmarks.record import Record
from benchmarks.subjects import SUBJECTS, is_prefix, subject

from .tiny import SETTING, bf16, shape

EAGER = [name for name in peers.PEERS if name != "compile"]


@pytest.mark.parametrize("setting", [SETTING, bf16()], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("family", ["bart", "llama"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_provider_is_right_on_every_layer(name, family, p, setting):
    if p and is_prefix(name):
        pytest.skip("prefix attention is measured without attention dropout")
    problem = subject(name)(shape(family), 5, p, setting)
    judge, solved = Judge(problem), set()
    for provider in peers.providers(problem, EAGER):
        if isinstance(provider, Absent):
            assert provider.reason
        elif provider.name != "frozen" and (provider.philox or p == 0):
            verdict = judge(provider)
            assert verdict.ok, (provider.name, verdict)
            solved.add(provider.name)
    assert {"pelt_fast", "pelt_fast reference"} <= solved
    rival = "concatenation + SDPA" if is_prefix(name) else "plain PyTorch"
    assert p or rival in solved


def test_a_problem_with_dropout_has_the_numbers_of_its_twin():
    one, other = (subject("ffn")(shape("bart"), 5, p, SETTING) for p in (0.0, 0.1))
    for a, b in zip(one.inputs, other.inputs):
        assert torch.equal(a, b)
    assert all(torch.equal(one.trained[n], other.trained[n]) for n in one.trained)


def test_who_misses_the_budget_is_not_timed(monkeypatch):
    def wrong(problem):
        def call(x):
            return problem.floor((x,), problem.frozen) * 1.001

        yield Provider("wrong", call, problem.trained)

    def broken(problem):
        def call(x):
            raise RuntimeError("no such kernel")

        yield Provider("broken", call, problem.trained)

    monkeypatch.setattr(peers.PEERS["plain"], "layer", wrong)
    monkeypatch.setattr(peers.PEERS["peft"], "layer", broken)
    names = ["frozen", "pelt_fast", "plain", "peft"]
    for p in (0.0, 0.1):
        entries = list(layer.measure("lora", shape("bart"), 4, p, SETTING, names, 1))
        about = {e["provider"]: e for e in entries}
        assert "is off by" in about["wrong"]["refused"] and "seconds" not in about["wrong"]
        assert about["broken"]["failed"] == "RuntimeError: no such kernel"
        assert about["pelt_fast"]["seconds"] and about["frozen"]["seconds"]
        table = layer.report(entries)
        assert "refused" in table and "no such kernel" in table


def test_ratios_are_taken_within_a_round():
    seconds = {"frozen": [1.0, 2.0, 4.0], "ours": [2.0, 4.0, 8.0]}
    entries = [dict(layer="l", mode=layer.MODES[0], provider=n, seconds=s)
               for n, s in seconds.items()]  # fmt: skip
    assert layer.rows(entries)[1]["ratio"] == (2.0, 2.0, 2.0)


def test_a_run_is_written_as_it_goes(tmp_path, tiny_shapes):
    plan = layer.Plan(("lora", "prefix-causal"), ("tiny-llama",), (4,), (0.0,), EAGER,
                      SETTING, repeats=2)  # fmt: skip
    record = Record("layer", tmp_path)
    layer.run(plan, record, progress=False)
    written = json.loads(record.path.read_text())
    assert written["finished"] and written["machine"]["command"]
    timed = [e for e in written["entries"] if "seconds" in e]
    assert all(len(e["seconds"]) == 2 for e in timed)
    assert {e["method"] for e in timed} == {"lora", "prefix-causal"}
    assert any(e["provider"] == "PEFT" for e in timed)


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, tiny_shapes, monkeypatch):
    plan = layer.Plan(("lora", "qkv"), ("tiny-bart",), (4,), (0.0,), ("pelt_fast",), SETTING,
                      repeats=1)  # fmt: skip
    measure = layer.measure

    def interrupted(name, *rest):
        if name == "qkv":
            raise KeyboardInterrupt
        return measure(name, *rest)

    monkeypatch.setattr(layer, "measure", interrupted)
    record = Record("layer", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        layer.run(plan, record, progress=False)
    written = json.loads(record.path.read_text())
    assert not written["finished"] and {e["method"] for e in written["entries"]} == {"lora"}


def test_what_does_not_fit_in_memory_is_skipped_and_said(tmp_path, monkeypatch, tiny_shapes):
    monkeypatch.setattr(layer, "free_bytes", lambda device: 1000)
    plan = layer.Plan(("ffn",), ("tiny-bart",), (4,), (0.0,), ("pelt_fast",), SETTING)
    (entry,) = layer.run(plan, Record("layer", tmp_path), progress=False)
    assert "GB are free" in entry["skipped"] and "skipped" in layer.report([entry])


def test_a_shape_too_large_allocates_nothing():
    setting = replace(SETTING, rows=1 << 16, length=1 << 12)
    assert layer.too_large("ffn", shape("bart"), 4, 0.0, setting)


def test_time_that_is_over_is_listed(tmp_path, tiny_shapes):
    plan = layer.Plan(("lora",), ("tiny-bart",), (4,), (0.0,), ("pelt_fast",), SETTING)
    record = Record("layer", tmp_path, seconds=0)
    assert layer.run(plan, record, progress=False) == []
    assert record.result["left"] == ["lora tiny-bart 4 p=0"]


def test_compiled_peers_are_right_too():
    problem = subject("lora")(shape("bart"), 4, 0.0, SETTING)
    judge = Judge(problem)
    found = list(peers.providers(problem, ["compile"]))
    assert [q.name for q in found] == ["torch.compile", "torch.compile(PEFT)"]
    assert all(judge(q).ok for q in found)
    assert layer.kept(found[0], problem) is None  # hooks do not see into it


def test_pytest_benchmark_runs_the_same_layers(tmp_path):
    file = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k",
               "prefix-cross and not reference", "-p", "no:xdist", f"--benchmark-json={file}"]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # no worker's
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(file.read_text())["benchmarks"]
    assert len(found) == 6 and all(b["extra_info"]["to_frozen"] > 0 for b in found)
