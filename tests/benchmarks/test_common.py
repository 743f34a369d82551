"""The harness: what is saved is counted, results are never written over."""

import json

import torch

from benchmarks import common


def test_saved_bytes_counts_storages_once_and_leaves_parameters_out():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8, requires_grad=True)
    assert common.saved_bytes(lambda: x @ weight, [weight]) == 4 * 8 * 4
    assert common.saved_bytes(lambda: (x * x)[:2].exp().sum(), []) == 4 * 8 * 4 + 2 * 8 * 4


def test_interleaved_takes_turns_and_gives_medians():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    medians = common.interleaved(steps, repeats=3, warmup=1)
    assert "".join(order) == "abababab" and set(medians) == {"a", "b"}


def test_results_carry_the_machine_and_are_never_written_over(tmp_path):
    first = common.write("subject", {"number": 1}, tmp_path)
    second = common.write("subject", {"number": 2}, tmp_path)
    assert first != second
    result = json.loads(first.read_text())
    assert result["number"] == 1
    assert {"commit", "device", "versions", "time"} <= result["machine"].keys()
    assert len(list(tmp_path.iterdir())) == 2


def test_table_is_markdown():
    lines = common.table(["a", "bb"], [["ccc", "d"]]).splitlines()
    assert lines == ["| a   | bb |", "| --- | -- |", "| ccc | d  |"]


def test_a_result_replaces_only_those_of_its_kind_of_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    made = [
        ("CPU AVX512, 2 threads", 10, ["lora", "mam", "prompt"]),
        ("CPU AVX2, 2 threads", 11, ["lora"]),
        ("CPU AVX512, 16 threads", 12, ["lora"]),
    ]
    for device, hour, methods in made:
        about = dict(time=f"2026-11-27T{hour}:00:00", commit=f"a{hour}", device=device)
        entries = [dict(method=method, hour=hour) for method in methods]
        path = common.result_path("model-x", about, tmp_path)
        common.dump(path, dict(machine=about, entries=entries))
    kinds = [common.kind_of_machine(r["machine"]) for r in common.newest_of_each_kind("model-x")]
    assert kinds == ["CPU AVX512", "CPU AVX2"]
    kept = [
        [(e["method"], e["hour"]) for e in r["entries"]] for r in common.not_superseded("model-x")
    ]
    assert kept == [[("lora", 12)], [("mam", 10), ("prompt", 10)], [("lora", 11)]]
    # a figure shows one kind of machine: the one with most entries
    assert [(e["method"], e["hour"]) for e in common.merged("model-x")] == [*kept[0], *kept[1]]
