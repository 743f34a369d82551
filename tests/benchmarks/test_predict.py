"""Predictions: counted bytes and flops over a device's rates."""

import os

import pytest

from benchmarks import predict, traffic
from benchmarks.bytes_moved import Operation
from benchmarks.record import Record

counts = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are counted, not launched, on a CPU"
)


def test_an_operation_takes_the_longest_of_its_three():
    device = predict.Device("d", bandwidth=1e12, peak=1e15, integers=1e13)
    moves = Operation("copy", moved=int(9e11))
    assert predict.seconds(moves, device) == pytest.approx(1.0)
    computes = Operation("mm", moved=1, flops=8e14)
    assert predict.seconds(computes, device) == pytest.approx(1.0)
    attends = Operation("_scaled_dot_product_flash_attention", moved=1, flops=8e14)
    assert predict.seconds(attends, device) == pytest.approx(1 / 0.6)
    draws = Operation("mask_bits_kernel", moved=1, drawn=int(8e13))
    assert predict.seconds(draws, device) == pytest.approx(60.0)


@counts
def test_flops_and_weights_are_counted():
    (case,) = (c for c in traffic.cases(["lora"]) if c.subject.endswith("p=0.0"))
    inputs, frozen = case.providers["frozen"]
    forward, backward = traffic.count(inputs, frozen, traffic.parameters_of(frozen))
    gemm = 2 * traffic.M * traffic.K * traffic.N
    assert [sum(o.flops for o in c.rows) for c in (forward, backward)] == [gemm, gemm]
    assert sum(o.weights for o in forward.rows) >= 2 * traffic.K * traffic.N
    inputs, ours = case.providers["kernels, tail"]
    forward, _ = traffic.count(inputs, ours, traffic.parameters_of(ours))
    assert sum(o.flops for o in forward.rows) == gemm * (1 + 2 * traffic.R / traffic.N)


@counts
def test_a_run_gives_ratios_for_every_device(tmp_path):
    for name in ("h200", "a100"):
        record = Record("predict", tmp_path)
        entries = predict.run(record, predict.device(name), ["lora"])
        ratios = {(e["layer"], e["provider"]): e["ratio"] for e in entries}
        for p in ("0.0", "0.1"):
            lora = f"LoRA linear 4096 R=16 p={p}"
            assert 1 < ratios[lora, "kernels, tail"] < ratios[lora, "kernels, accumulate"]
            assert ratios[lora, "kernels, accumulate"] < ratios[lora, "PEFT, bf16 factors"]
        assert "predicted, ms" in predict.report(entries)
