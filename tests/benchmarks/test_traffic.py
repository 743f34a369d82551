"""Bytes moved: the promises in passes, and the formulas in the kernels' heads."""

import os

import pytest
import torch

from benchmarks import traffic
from benchmarks.bytes_moved import Counter, bytes_moved, counted_kernels
from benchmarks.gpu.kernel_case import Sizes
from benchmarks.gpu.kernel_cases import cases
from pelt_fast.kernels import config

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are counted, not launched, on a CPU"
)


def passes(case):
    return {row.provider: row for row in traffic.measure(case)}


def test_what_counts():
    x, w = torch.randn(64, 32), torch.randn(16, 32)
    assert bytes_moved(lambda: x @ w.t(), [w]).bytes == 4 * (64 * 32 + 64 * 16)
    assert bytes_moved(lambda: x @ w.double().float().t(), [w]).bytes == 4 * (64 * 32 + 64 * 16)
    assert bytes_moved(lambda: x.t()[:3].expand(3, 64), []).bytes == 0
    assert bytes_moved(lambda: x.add_(1), []).bytes == 2 * 4 * x.numel()
    assert bytes_moved(lambda: x[:, :1].expand(64, 32) + 1, []).bytes == 4 * (64 + 64 * 32)
    out = torch.empty(64, 16)
    assert bytes_moved(lambda: torch.mm(x, w.t(), out=out), [w]).bytes == 4 * 64 * 48
    assert bytes_moved(lambda: torch.zeros_like(x), []).bytes == 4 * x.numel()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_lora_moves_a_quarter_of_pefts_bytes(p):
    found = passes(traffic.lora(p))
    assert found["frozen"].both == pytest.approx(4, abs=0.01)
    assert found["kernels, accumulate"].both <= 12
    assert found["kernels, tail"].both <= 7.75  # 7, and the two-stage workspace of dS
    assert found["PEFT"].both >= 45 and found["PEFT, bf16 factors"].both >= 19.9


def test_adapters_are_at_their_floor():
    for sequential, floor in ((False, 3), (True, 4)):
        kernels = passes(traffic.adapter(sequential))["kernels"]
        assert kernels.forward <= 3.1
        # dy, x, dx (sequential: dy again). An H200 runs dT, dU and du in the library from R = 37:
        # dy twice more
        assert kernels.backward <= floor + 2.7


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_widened_ffn_makes_no_pass_more_than_the_frozen_block(p):
    """Beside R / F of each pass: backward reads dy and x for the weight gradients, dy for a bias."""
    found = passes(traffic.ffn(p))
    frozen, ours, plain = found["frozen"], found["kernels"], found["plain PyTorch"]
    share = traffic.RANK / traffic.INNER
    assert ours.forward <= frozen.forward * (1 + share)
    assert ours.backward <= frozen.backward * (1 + share) + 4.3
    assert ours.both <= 0.75 * plain.both


def test_an_adapter_on_another_tensor_reads_it_and_adds_to_the_output():
    """Two passes more than a widened block: its own input forward, that input's gradient
    backward."""
    found = passes(traffic.ffn_beside())
    frozen, ours, plain = found["frozen"], found["kernels"], found["plain PyTorch"]
    share = traffic.RANK / traffic.INNER
    assert ours.forward <= frozen.forward * (1 + share) + 1
    assert ours.backward <= frozen.backward * (1 + share) + 4.3 + 1
    assert ours.both <= 0.85 * plain.both


@pytest.mark.parametrize("causal", [False, True])
def test_a_prefix_copies_neither_keys_nor_values(causal):
    case = traffic.prefix(causal)
    found = passes(case)
    frozen, ours, other = found["frozen"], found["kernels"], found["concatenation"]
    assert ours.forward - frozen.forward <= 4
    inputs, function = case.providers["kernels"]
    leaves = [t.detach().requires_grad_() for t in inputs]
    counter = Counter(traffic.parameters_of(function))
    with function.context(), counted_kernels(counter):
        y = function(*leaves)
        with counter:
            y.sum().backward()
    unit = 2 * case.pass_elements
    parts = sum(row.moved for row in counter.rows if row.name == "reduce_pair_kernel") / unit
    # six passes beside the two-stage workspace, which the first stage writes and the second reads
    assert ours.backward - frozen.backward - 2 * parts <= 6
    assert ours.forward < other.forward


def test_kernels_touch_what_their_heads_say(monkeypatch):
    """The bytes of benchmarks/gpu, written from the heads of the files, against the arguments."""
    monkeypatch.setattr(config, "architecture", lambda device: "sm90")
    monkeypatch.setattr(config, "processors", lambda device: 132)
    seen = set()
    with counted_kernels(Counter([])):
        for case in cases(torch.device("meta"), Sizes(batch=16)):
            counter = Counter([])
            with counted_kernels(counter):
                case.ours()
            least = 0.5 if "(with" in case.name else 0.95  # a copy that is timed, but no kernel's
            # the parts of a two-stage sum are not in the formula: its first stage writes them, its
            # second reads them
            parts = sum(row.moved for row in counter.rows if "reduce_" in row.name)
            most = 1.8 if case.kernel == "prefix_bwd" else 1.3  # dq of P=200 has its own kernel
            assert counter.bytes >= least * case.bytes, (case.kernel, case.name)
            assert counter.bytes - 2 * parts <= most * case.bytes, (case.kernel, case.name)
            seen.add(case.kernel)
    assert len(seen) >= 14
