"""How costs grow, and the sizes at which another plan takes over: run small, and wrong arguments."""

import json

import pytest

from benchmarks import bench, edges, scale
from benchmarks.record import Record
from pelt_fast.ops.common import passes
from pelt_fast.ops.prefix_attention import cpu as prefix_cpu
from tests.benchmarks.command import main

PLAN = scale.Plan(models=("tiny-roberta",), values=2, layers=1, rows=2, length=8, repeats=1)


@pytest.fixture(autouse=True)
def runs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "RUNS", tmp_path / "runs")


def test_every_axis_is_measured_at_every_size(tmp_path, tiny_shapes):
    entries = scale.run(PLAN, Record("scale", tmp_path))
    expected = {
        (axis, method, value)
        for axis, (values, methods) in scale.AXES.items()
        for method in methods
        for value in values[: PLAN.values]
    }
    assert {(row["axis"], row["method"], row["value"]) for row in scale.rows(entries)} == expected
    assert all(row["ours"] > 0 and row["frozen"] > 0 for row in scale.rows(entries))
    report = scale.report(entries)
    assert "exponent of" in report and "| prefix " in report


def test_a_point_changes_one_size(tiny_shapes):
    points = {(p.axis, p.method, p.value): p for p in scale.wanted(PLAN)}
    assert points["tokens", "lora", 512].rows == 512 // PLAN.length
    assert {m.size for m in points["rank", "lora", 16].config.modifications} == {16}
    (prefix,) = points["prefix", "prefix_nomlp", 32].config.modifications[:1]
    assert prefix.form == "prefix" and prefix.size == 32
    assert points["layers", "mam", 2].shape.layers == 2 and points["methods", "lora", 8].count == 8


def test_an_exponent_is_that_of_a_power():
    values = [4, 16, 64]
    assert scale.exponent(values, [3.0 * n**2 for n in values]) == pytest.approx(2.0)
    assert scale.exponent(values, [5.0] * 3) == pytest.approx(0.0)
    # of one size, of a cost below the noise, of an unknown peak
    assert scale.exponent([4], [1.0]) is None
    assert scale.exponent(values, [1.0, -0.1, 2.0]) is None
    assert scale.exponent(values, [1.0, None, 2.0]) is None


def test_scale_prints_draws_and_writes(tmp_path, capsys, tiny_shapes):
    folder = tmp_path / "figures"
    assert main(["bench", "scale", "--quick", "--axis", "layers", "--method", "lora", "--rows", "1",
                 "--model", "tiny-roberta", "--length", "8", "--repeats", "1",
                 "--plot", str(folder)]) == 0  # fmt: skip
    assert "exponent of" in capsys.readouterr().out
    (written,) = (tmp_path / "runs").glob("*-scale.json")
    assert json.loads(written.read_text())["finished"]
    assert "lora" in (folder / "scale-layers.svg").read_text()


@pytest.mark.parametrize("arguments, said", [
    (["--axis", "nope"], "unknown axis 'nope': choose tokens"),
    (["--method", "nope"], "unknown method 'nope'"),
    (["--axis", "prefix", "--method", "lora"], "--axis prefix changes nothing in 'lora'"),
    (["--axis", "rank", "--method", "prefix_nomlp"], "--axis rank changes nothing"),
    (["--model", "bart-large", "t5-base"], "scale runs on one model"),
    (["--model", "nope"], "unknown model 'nope'"),
    (["--rows", "0"], "--rows must be at least 1"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(arguments, said, capsys, tmp_path):
    assert main(["bench", "scale", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_every_threshold_of_a_cpu_has_an_edge():
    found = {edge.last for edge in edges.edges(edges.Plan())}
    assert found == {
        passes.FEW_ROWS, passes.MAX_FEW, passes.PLAIN_RANK, passes.MASKED_RANK,
        prefix_cpu.MAX_PREFIX, prefix_cpu.MAX_HEAD_DIM,
    }  # fmt: skip


def test_edges_are_measured_on_both_sides(tmp_path):
    plan = edges.Plan(rows=4, repeats=2)
    entries = edges.run(plan, Record("edges", tmp_path))
    assert [row["edge"] for row in edges.rows(entries)] == edges.wanted(plan)
    assert "at most 1.10" in edges.report(entries)


def test_an_edge_that_costs_more_than_its_work_is_said():
    def entry(provider: str, seconds: float) -> dict:
        return dict(edge="rank", last=10, provider=provider, seconds=[seconds] * 3)

    right = [entry(edges.BELOW, 1.0), entry(edges.ABOVE, 1.1)]
    assert edges.rows(right)[0]["ratio"] == pytest.approx(1.0)
    assert "SLOWER" not in edges.report(right)
    assert "SLOWER" in edges.report([right[0], entry(edges.ABOVE, 1.3)])
