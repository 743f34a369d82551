"""The CUDA C++ kernels against fp64, alone and under the op that runs them; needs a GPU and
``_C_cuda`` (make gpu builds it)."""

import pytest
import torch

import pelt_fast
from pelt_fast import functional
from pelt_fast.kernels.mask import mask_bits
from pelt_fast.ops.common import native_cuda
from pelt_fast.ops.common.dropout import dropout
from pelt_fast.ops.lora import gpu as cuda

from .judge import check, check_shows, dense, seed

pytestmark = pytest.mark.skipif(
    native_cuda.why_missing() is not None, reason=str(native_cuda.why_missing())
)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# M, K, N, R: one tile, edges of tiles, a tail of several steps
SHAPES = [(128, 64, 256, 16), (1, 8, 8, 8), (300, 200, 520, 40), (130, 1000, 264, 136)]


def needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the tail GEMM is for sm_90")


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_tail_gemm_matches_fp64_oracle(shape, dtype, p, transposed):
    needs_hopper()
    M, K, N, R = shape
    x, s, bias = dense(M, K, dtype=dtype), dense(M, R, dtype=dtype), dense(N)
    # products of one size, or the larger one's budget would hide the other
    w = dense(*((K, N) if transposed else (N, K)), dtype=dtype, scale=K**-0.5)
    u = dense(R, N, scale=R**-0.5) if transposed else dense(N, R, scale=R**-0.5)
    row = seed() if p else None

    def expression(x, w, s, u, bias):
        w, u = (w, u) if transposed else (w.t(), u.t())
        return x @ w + bias + dropout(0.5 * (s @ u), p, row)

    mask = dict(dropout_p=p, bits=mask_bits(row, p, M, N) if p else None)
    y = cuda.cuda_tail_gemm(x, w, s, u, scale=0.5, bias=bias, transposed=transposed, **mask)
    inputs = (x, w, s, u.to(dtype), bias.to(dtype))
    same, exact = expression(*inputs), expression(*(t.double() for t in inputs))
    check(y, same, exact, dtype)
    no_tail = expression(x, w, torch.zeros_like(s), *inputs[3:])
    check_shows(no_tail, same, exact, dtype)
    assert torch.equal(
        y, cuda.cuda_tail_gemm(x, w, s, u, scale=0.5, bias=bias, transposed=transposed, **mask)
    )


@every_dtype
@pytest.mark.parametrize("m, n, r", [(1, 8, 8), (37, 520, 8), (1000, 1000, 40), (513, 768, 64)])
def test_rank_gradients_match_fp64_oracle(m, n, r, dtype):
    dy, h, up = dense(m, n, dtype=dtype), dense(m, r, dtype=dtype), dense(n, r)
    found = cuda.cuda_rank_up_gradients(dy, h, up, scale=0.5, need_bias=True)

    def expression(dy, h, up):
        return 0.5 * dy @ up, 0.5 * dy.t() @ h, 0.5 * dy.sum(0)

    low = expression(dy, h, up.to(dtype))
    wanted = expression(dy.double(), h.double(), up.to(dtype).double())
    for its, plain, exact in zip(found, low, wanted, strict=True):
        check(its, plain, exact, its.dtype)
    again = cuda.cuda_rank_up_gradients(dy, h, up, scale=0.5, need_bias=True)
    assert all(map(torch.equal, found, again))


@every_dtype
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_lora_on_the_cuda_kernels(p, dtype):
    needs_hopper()
    M, K, N, R = 200, 128, 264, 16
    weight, bias, dy = (
        dense(N, K, dtype=dtype, scale=0.1),
        dense(N).to(dtype),
        dense(M, N).to(dtype),
    )
    start = dense(M, K, dtype=dtype), dense(R, K, scale=K**-0.5), dense(N, R)
    results = {}
    for name in ("reference", "cuda"):
        x, a, b = (t.clone().requires_grad_() for t in start)
        torch.manual_seed(0)
        with pelt_fast.backend(name):
            y = functional.lora_linear(x, weight, bias, a, b, scale=2.0, dropout_p=p)
            results[name] = (y, *torch.autograd.grad(y, (x, a, b), dy))
    x, a, b = (t.double().requires_grad_() for t in start)
    torch.manual_seed(0)
    with pelt_fast.backend("reference"):
        y = functional.lora_linear(x, weight.double(), bias.double(), a, b, scale=2.0, dropout_p=p)
        exact = (y, *torch.autograd.grad(y, (x, a, b), dy.double()))
    for its, plain, wanted in zip(results["cuda"], results["reference"], exact, strict=True):
        check(its, plain, wanted, dtype)


def test_what_the_kernels_do_not_take_is_refused_or_left_to_others():
    x, weight = dense(16, 64, dtype=torch.bfloat16), dense(32, 64, dtype=torch.bfloat16)
    assert not native_cuda.covers_tail(x.float(), weight, 16)
    assert not native_cuda.covers_tail(x, weight, 12)
    assert not native_cuda.covers_tail(x[:, 1:], weight[:, 1:], 16)
    assert not native_cuda.covers_one_pass(x, 72)
    with pytest.raises(RuntimeError, match=r"u must have shape \(32, 16\), got \(32, 8\)"):
        cuda.cuda_tail_gemm(x, weight, dense(16, 16, dtype=x.dtype), dense(32, 8))
    with pytest.raises(RuntimeError, match="multiples of 8"):
        cuda.cuda_rank_up_gradients(x, dense(16, 12, dtype=x.dtype), dense(64, 12), scale=1.0)
