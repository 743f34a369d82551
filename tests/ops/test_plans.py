"""What the ops run against the fp64 oracle: outputs and every gradient inside the budget."""

import pytest
import torch

from pelt_fast import functional
from pelt_fast.ops.common import chunking as blocks
from pelt_fast.ops.common.backends import backend
from pelt_fast.testing import cases, judge, run

CASES = list(cases())
LARGE = list(cases((401, 700, 640, 17)))  # several row blocks, nothing divides


def identity(case):
    return f"{case.op} {case.name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
@pytest.mark.parametrize("name", ["reference", "auto"])
def test_op_is_within_budget_of_the_fp64_oracle(case, name, dtype):
    verdict = judge(case, name, dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize("case", [c for c in LARGE if c.op != "prefix"], ids=identity)
def test_op_is_within_budget_over_several_row_blocks(case, monkeypatch):
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", 1 << 15)
    verdict = judge(case, "auto", torch.float32)
    assert verdict.ok, verdict


@pytest.mark.parametrize("case", [c for c in CASES if "p=0.1" in c.name], ids=identity)
def test_plan_drops_the_same_elements_as_the_reference(case):
    tensors = case.tensors(torch.float64, torch.float64)
    with backend("reference"):
        expected = run(case.call, tensors)
    actual = run(case.call, tensors)
    for name, value in expected.items():
        assert torch.allclose(actual[name], value, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_op_is_deterministic(case):
    tensors = case.tensors(torch.float32, torch.float32)
    first = run(case.call, tensors)
    for _ in range(2):
        again = run(case.call, tensors)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("case", CASES, ids=identity)
@pytest.mark.parametrize("name", ["reference", "auto"])
def test_inference_gives_the_same_bits_and_keeps_nothing(case, name):
    tensors = case.tensors(torch.float32, torch.float32)
    with backend(name):
        expected = run(case.call, tensors)["y"]
        torch.manual_seed(2)
        with torch.no_grad():
            y = case.call(tensors)
    assert torch.equal(y, expected) and not y.requires_grad


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_flash_and_merge_is_the_reference_in_fp64(causal, mask):
    b, h, g, t, s, d, length = 5, 6, 3, 11, 17, 8, 4
    q = torch.randn(b, t, h, d).double().transpose(1, 2).requires_grad_()
    k, v = (torch.randn(b, g, s, d).double().requires_grad_() for _ in range(2))
    pk, pv = (torch.randn(g, length, d).double().requires_grad_() for _ in range(2))
    attn_mask = None
    if mask:
        attn_mask = torch.rand(b, 1, t, s) > 0.3
        attn_mask[1, :, 4] = False
        if mask == "additive":
            attn_mask = torch.zeros(attn_mask.shape).double().masked_fill(~attn_mask, -float("inf"))
    results = {}
    for name in ("reference", "auto"):
        with backend(name):
            o = functional.prefix_attention(q, k, v, pk, pv, attn_mask=attn_mask, is_causal=causal)
            weights = torch.linspace(-1, 1, o.numel()).double().view(o.shape)
            results[name] = [o, *torch.autograd.grad((o * weights).sum(), (q, k, v, pk, pv))]
    for expected, actual in zip(*results.values(), strict=True):
        assert torch.allclose(actual, expected, rtol=0, atol=1e-13)


def test_gradients_of_fp32_factors_on_a_bf16_base_are_not_rounded():
    for case in CASES:
        tensors = case.tensors(torch.bfloat16, torch.float32)
        for name, grad in run(case.call, tensors).items():
            if name.removeprefix("d_") in case.trainable:
                assert grad.dtype == torch.float32, (case, name)
                assert not torch.equal(grad, grad.bfloat16().float()), (case, name)


def test_input_gradient_of_dropped_branch_keeps_the_scale():
    """dX must carry 1 / (1 - p): the mean over many masks is the undropped gradient."""
    x, weight = torch.randn(4, 64, requires_grad=True), torch.zeros(8, 64)
    a, b = torch.randn(2, 64), torch.randn(8, 2)
    y = functional.lora_linear(x, weight, None, a, b, scale=1.0)
    (exact,) = torch.autograd.grad(y.sum(), x)
    total = torch.zeros_like(x)
    for _ in range(400):
        y = functional.lora_linear(x, weight, None, a, b, scale=1.0, dropout_p=0.5)
        total += torch.autograd.grad(y.sum(), x)[0]
    ratio = (total / 400 / exact).mean().item()
    assert abs(ratio - 1) < 0.02


@pytest.fixture(params=["auto", "reference"])
def either_backend(request):
    with backend(request.param):
        yield


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (0, 3, 6)])
def test_empty_batches_give_empty_outputs_and_zero_gradients(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, a, b = torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    a.requires_grad_(), b.requires_grad_()
    y = functional.lora_linear(x, weight, None, a, b, scale=1.0, dropout_p=0.1)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 5) and x.grad.shape == x.shape
    assert torch.all(a.grad == 0) and torch.all(b.grad == 0)
    up = torch.randn(6, 2, requires_grad=True)
    z = functional.sequential_adapter(x, a, None, up, None, dropout_p=0.1)
    z.sum().backward()
    assert z.shape == x.shape and torch.all(up.grad == 0)
    f = functional.ffn_parallel_adapter(
        x, torch.randn(7, 6), None, torch.randn(6, 7), None, a, None, up, None, dropout_p=0.1
    )
    f.sum().backward()
    assert f.shape == x.shape and torch.all(up.grad == 0)


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["B=0", "T=0", "S=0"])
def test_prefix_attention_with_nothing_in_a_dimension(sizes):
    batch, queries, keys = sizes
    q = torch.randn(batch, 2, queries, 4, requires_grad=True)
    k = v = torch.randn(batch, 2, keys, 4)
    prefix = torch.randn(2, 3, 4, requires_grad=True)
    o = functional.prefix_attention(q, k, v, prefix, prefix)
    o.sum().backward()
    assert o.shape == q.shape and torch.isfinite(prefix.grad).all()
    if keys == 0:  # the prefix alone
        exact = torch.softmax(q @ prefix.transpose(-1, -2) * 0.5, -1) @ prefix
        assert torch.allclose(o, exact, atol=1e-6)


def test_inputs_are_never_written_to():
    for case in CASES:
        tensors = case.tensors(torch.float32, torch.float32)
        before = {name: value.detach().clone() for name, value in tensors.items()}
        y = case.call(tensors)
        y.sum().backward()
        for name, value in before.items():
            assert torch.equal(tensors[name], value), (case, name)


def test_strided_and_leading_dims_give_what_contiguous_rows_give():
    x = torch.randn(3, 9, 14)[:, 1:7, :10]
    weight, a, b = torch.randn(5, 10), torch.randn(2, 12)[:, 1:11], torch.randn(2, 5).t()
    y = functional.lora_linear(x, weight, None, a, b, scale=2.0)
    flat = functional.lora_linear(
        x.reshape(-1, 10), weight, None, a.contiguous(), b.contiguous(), scale=2.0
    )
    assert torch.allclose(y.reshape(-1, 5), flat, atol=1e-6)
