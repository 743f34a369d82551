"""Every op on the triton backend: the composition of kernels and library GEMMs, gradients too."""

import pytest
import torch

from pelt_fast import functional
from pelt_fast.ops.common.backends import backend
from pelt_fast.testing import cases, doubled, has_its_own_mask, judge, run
from tests.flat import reference

from .judge import COMPILED, DEVICE, DTYPES, check, dense, seed

CASES = list(cases())
# aligned sizes (bits in backward), and ranks past each of config.FUSED_RANK
LARGE = list(cases((17, 48, 40, 130)))
MORE = [*cases((40, 64, 72, 16)), *cases((17, 40, 48, 70)), *LARGE]


def identity(case):
    return f"{case.op} {case.name}"


def needs_a_known_mask(case):
    """Skip what no oracle can follow."""
    if has_its_own_mask(case, "triton", DEVICE):
        pytest.skip("the context's mask is the library kernel's own: test_context_kernels reads it")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_op_is_within_budget_of_the_fp64_oracle(case, dtype):
    needs_a_known_mask(case)
    verdict = judge(case, "triton", dtype, DEVICE)
    assert verdict.ok, verdict


@pytest.mark.quick(every=5)
@pytest.mark.parametrize("case", [c for c in MORE if c.op != "prefix"], ids=identity)
def test_op_is_within_budget_at_every_rank_class(case):
    verdict = judge(case, "triton", torch.float16, DEVICE)
    assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in LARGE if c.op != "prefix"], ids=identity)
def test_a_bias_or_an_output_dropout_leaves_a_large_rank_to_the_library(case, dtype, monkeypatch):
    monkeypatch.setattr("pelt_fast.kernels.rank_update.rank_up", None)
    verdict = judge(case, "triton", dtype, DEVICE)
    assert verdict.ok, verdict


@pytest.mark.parametrize("case", [c for c in CASES if "p=0.1" in c.name], ids=identity)
def test_op_drops_the_same_elements_as_the_reference(case):
    needs_a_known_mask(case)
    tensors = case.tensors(torch.float32, torch.float32, DEVICE)
    with backend("reference"):
        same = run(case.call, tensors)
        exact = run(case.call, tensors | doubled(tensors))
    with backend("triton"):
        actual = run(case.call, tensors)
    for name, value in exact.items():
        check(actual[name], same[name], value, torch.float32)


@pytest.mark.quick(every=5)
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=identity)
def test_inference_gives_the_same_numbers(case):
    """Not the same bits: a kernel that keeps nothing for backward is another kernel."""
    tensors = case.tensors(torch.float16, torch.float32, DEVICE)
    with backend("triton"):
        expected = run(case.call, tensors)["y"]
        torch.manual_seed(2)
        with torch.no_grad():
            check(case.call(tensors), expected, expected.double(), torch.float16)


@pytest.mark.quick(every=5)
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
    from tests.flat import gpu

    lora_backward = gpu.lora_backward

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


@pytest.mark.skipif(not COMPILED, reason="opcheck and torch.compile of CUDA impls need a GPU")
@pytest.mark.parametrize("case", CASES, ids=identity)
def test_op_compiles_without_a_graph_break_on_the_gpu(case):
    tensors = case.tensors(torch.bfloat16, torch.float32, DEVICE)
    eager = run(case.call, tensors)
    compiled = run(torch.compile(case.call, fullgraph=True), tensors)
    for name, value in eager.items():
        if "p=0.0" in case.name:  # the mask of a compiled draw of the seed is another
            check(compiled[name], value, value.double(), torch.bfloat16)
    assert all(torch.isfinite(value).all() for value in compiled.values())


@pytest.mark.skipif(not COMPILED, reason="the library kernels with dropout are on a GPU")
@pytest.mark.parametrize("masked", [False, True])
def test_attention_dropout_on_the_gpu_differentiates_what_it_computed(masked):
    """The context's mask is the library's own: compare the gradient with a difference quotient of
    the same draw."""
    dtype = torch.float32 if masked else torch.bfloat16
    q, k, v = (dense(2, 4, 64, 32, dtype=dtype).requires_grad_() for _ in range(3))
    prefix = [dense(4, 7, 32).requires_grad_() for _ in range(2)]
    mask = torch.rand(2, 1, 64, 64, device=DEVICE) > 0.2 if masked else None

    def f(*leaves):
        torch.manual_seed(5)
        return functional.prefix_attention(*leaves, attn_mask=mask, dropout_p=0.2)

    out = f(q, k, v, *prefix)
    dy = torch.randn_like(out)
    grads = torch.autograd.grad(out, [q, k, v, *prefix], dy)
    assert torch.equal(out, f(q, k, v, *prefix))
    for i in (2, 4):  # linear in v and prefix_v: the quotient is exact
        leaves = [t.detach() for t in (q, k, v, *prefix)]
        step = torch.randn_like(leaves[i])
        leaves[i] = leaves[i] + step
        change = ((f(*leaves) - out).double() * dy.double()).sum()
        exact = (grads[i].double() * step.double()).sum()
        assert torch.allclose(change, exact, rtol=0.05, atol=0.5), (i, change, exact)
