"""Every op on the triton backend: the composition of kernels and library GEMMs, gradients too."""

import pytest
import torch

from pelt_fast.ops.backends import backend
from pelt_fast.reference import low_rank as reference
from pelt_fast.testing import cases, judge, run

from .judge import DEVICE, DTYPES, check, dense, seed

CASES = list(cases())
# aligned sizes (bits in backward), and ranks past each of config.FUSED_RANK
MORE = [*cases((40, 64, 72, 16)), *cases((17, 40, 48, 70)), *cases((17, 48, 40, 130))]


def identity(case):
    return f"{case.op} {case.name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_op_is_within_budget_of_the_fp64_oracle(case, dtype):
    verdict = judge(case, "triton", dtype, DEVICE)
    assert verdict.ok, verdict


@pytest.mark.parametrize("case", [c for c in MORE if c.op != "prefix"], ids=identity)
def test_op_is_within_budget_at_every_rank_class(case):
    verdict = judge(case, "triton", torch.float16, DEVICE)
    assert verdict.ok, verdict


@pytest.mark.parametrize("case", [c for c in CASES if "p=0.1" in c.name], ids=identity)
def test_op_drops_the_same_elements_as_the_reference(case):
    if case.op == "prefix" and DEVICE.type == "cuda":
        pytest.skip("the context's mask is the library kernel's own there")
    tensors = case.tensors(torch.float32, torch.float32, DEVICE)
    with backend("reference"):
        expected = run(case.call, tensors)
    with backend("triton"):
        actual = run(case.call, tensors)
    for name, value in expected.items():
        check(actual[name], value, value.double(), torch.float32)


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_op_is_deterministic(case):
    tensors = case.tensors(torch.float32, torch.float32, DEVICE)
    with backend("triton"):
        first = run(case.call, tensors)
        for _ in range(2):
            again = run(case.call, tensors)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("needs", [(i & 1 > 0, i & 2 > 0, i & 4 > 0) for i in range(8)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_lora_backward_gives_what_is_needed_and_no_more(needs, p):
    from pelt_fast.fused.low_rank import lora_backward

    dy, x, s, row = dense(9, 24), dense(9, 32), dense(9, 4), seed() if p else None
    weight, a, b = dense(24, 32), dense(4, 32), dense(24, 4)
    arguments = (weight, a, b, 2.0, p, row, needs)
    nothing = x.new_empty(0)
    arguments = (dy, x if needs[1] else nothing, s if needs[2] else nothing, *arguments)
    actual = lora_backward(*arguments)
    expected = reference.lora_backward(*arguments)
    for got, want in zip(actual, expected, strict=True):
        if want.numel():
            check(got, want, want.double(), torch.float32)
        else:
            assert not got.numel()
