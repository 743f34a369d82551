"""The frozen GEMM with a rank tail, both variants, against fp64."""

import pytest
import torch

from pelt_fast.kernels import config
from pelt_fast.kernels.mask import mask_bits
from pelt_fast.kernels.tail_gemm import can_use_descriptors, tail_gemm
from pelt_fast.kernels.tiles import MAX_RANK
from pelt_fast.ops.common.dropout import dropout
from pelt_fast.ops.lora.op import lora_fwd
from tests.flat import gpu, reference

from .judge import DTYPES, check, check_shows, dense, seed, sliced

lora_forward, lora_backward = gpu.lora_forward, gpu.lora_backward

# M, K, N, R; the third can be described to the copy engine
SHAPES = [(1, 1, 1, 1), (37, 50, 44, 5), (40, 64, 136, 16), (17, 33, 70, 100)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both = pytest.mark.parametrize("descriptors", [False, True])


@every_dtype
@both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_tail_gemm_matches_fp64_oracle(shape, dtype, p, transposed, descriptors):
    M, K, N, R = shape
    make = dense if shape == SHAPES[2] else sliced
    x, s, u = make(M, K, dtype=dtype), make(M, R, dtype=dtype), dense(R, N, scale=R**-0.5)
    # products of one size, or the larger one's budget would hide the other
    w = make(*((N, K) if transposed else (K, N)), dtype=dtype, scale=K**-0.5)
    w = w.t() if transposed else w
    bias, row = dense(N).to(dtype), seed() if p else None

    def expression(x, w, s, u, bias):
        return x @ w + bias + dropout(0.5 * (s @ u), p, row)

    inputs = (x, w, s, u.to(dtype), bias)
    y = tail_gemm(x, w, s, u, scale=0.5, bias=bias, dropout_p=p, seed=row, descriptors=descriptors)
    same, wanted = expression(*inputs), expression(*(t.double() for t in inputs))
    check(y, same, wanted, dtype)
    if y.numel() > 1:  # one number may happen to be small
        no_tail = expression(x, w, torch.zeros_like(s), *inputs[3:])
        check_shows(no_tail, same, wanted, dtype)
    if p and N % 8 == 0:
        bits = mask_bits(row, p, M, N)
        mask = dict(dropout_p=p, seed=row, bits=bits, descriptors=descriptors)
        check(tail_gemm(x, w, s, u, scale=0.5, bias=bias, **mask), same, wanted, dtype)


def test_what_the_copy_engine_cannot_take_runs_on_pointers():
    assert can_use_descriptors(dense(32, 64))
    assert not can_use_descriptors(sliced(32, 64))  # rows of 67 elements, from the second on
    assert not can_use_descriptors(dense(32, 64).t())
    assert not can_use_descriptors(dense(8, 64))


@pytest.mark.parametrize("plan", ["tail", "tail_descriptor", "tail_cuda"])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("scale", [2.0, 0.0])
def test_lora_runs_the_plan_of_the_table(plan, p, scale, monkeypatch):
    row = config.PlanRow(MAX_RANK, plan, "the test's")
    monkeypatch.setitem(config.LORA_PLANS, "any", (row,))
    monkeypatch.setattr(config, "architecture", lambda device: "any")
    x, weight, bias, dy = dense(20, 32), dense(24, 32), dense(24), dense(20, 24)
    a, b, mask = dense(4, 32), dense(24, 4), (p, seed() if p else None)
    y, s = lora_forward(x, weight, bias, a, b, scale, *mask)
    want, _ = reference.lora_forward(x, weight, bias, a, b, scale, *mask)
    check(y, want, want.double(), torch.float32)
    grads = lora_backward(dy, x, s, weight, a, b, scale, *mask, [True] * 3)
    expected = reference.lora_backward(dy, x, s, weight, a, b, scale, *mask, [True] * 3)
    for got, want in zip(grads, expected):
        check(got, want, want.double(), torch.float32)


def test_a_transposed_frozen_weight_is_no_reason_for_the_plan(monkeypatch):
    monkeypatch.setenv("PELT_FAST_STRICT", "1")
    x, weight, a, b = dense(20, 32), dense(32, 24).t(), dense(4, 32), dense(24, 4)
    y, _ = lora_fwd.gpu(x, weight, None, a, b, 2.0, 0.0, None)
    want = x @ weight.t() + 2.0 * (x @ a.t()) @ b.t()
    check(y, want, want.double(), torch.float32)
