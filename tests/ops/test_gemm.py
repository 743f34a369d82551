"""The library's products, in its own 16 bits and in fp32 a block of rows at a time."""

import pytest
import torch

from pelt_fast.ops.common import gemm, gradients, passes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def made(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def close(found, wanted, depth):
    """Within the rounding of the result, and of a sum of ``depth`` products in fp32."""
    own, fp32 = torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps
    size = wanted.abs().max()
    assert (found.double() - wanted).abs().max() <= (own + depth**0.5 * fp32) * size


@pytest.fixture(params=[False, True], ids=["as here", "without 16-bit arithmetic"], autouse=True)
def arithmetic(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(gemm, "in_16_bits", lambda dtype, device: False)
    gemm.runs_in_fp32.cache_clear()
    yield
    gemm.runs_in_fp32.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, n", [(1, 3, 5), (70, 129, 33), (3000, 64, 16), (0, 4, 3)])
def test_products(m, k, n, dtype):
    x, w, base, bias = (made(*s, dtype=dtype) for s in ((m, k), (k, n), (m, n), (n,)))
    exact = x.double() @ w.double()
    if not m:
        assert passes.linear(x, w.t(), bias).shape == gradients.product(x, w).shape == (m, n)
        return
    close(gradients.product(x, w), exact, k)
    close(passes.linear(x, w.t()), exact, k)
    close(passes.linear(x, w.t(), bias), exact + bias.double(), k)
    close(passes.add_product(base, x, w, -0.5, None), base.double() - 0.5 * exact, k)
    wide = made(m, 2 * n, dtype=dtype)
    for out in (base.clone(), wide[:, n:]):
        for call, wanted in (
            (lambda o: gradients.product(x, w, o), exact),
            (lambda o: passes.linear(x, w.t(), None, o), exact),
            (lambda o: passes.linear(x, w.t(), bias, o), exact + bias.double()),
        ):
            assert call(out) is out
            close(out, wanted, k)
    over = base.clone()
    assert passes.add_product(over, x, w, 2.0, over) is over
    close(over, base.double() + 2 * exact, k)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_gradient_is_summed_in_fp32(dtype, result):
    """A sum of 16-bit products over many rows, rounded once at the end."""
    left, right = made(3000, 7, dtype=dtype), made(3000, 11, dtype=dtype)
    found = gradients.weight_gradient(left, right, result)
    assert found.dtype == result
    close(found, left.double().t() @ right.double(), 3000)
