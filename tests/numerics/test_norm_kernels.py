"""A LayerNorm in front of a rank-R product, forward and backward, against fp64."""

import pytest
import torch
from torch.nn import functional as F

from pelt_fast.kernels.norm import moments, norm_bwd, norm_gradients
from pelt_fast.kernels.rank_down import rank_down

from .judge import DTYPES, check, dense, sliced

# M, K, R: one row, nothing divides, several rank blocks
SHAPES = [(1, 1, 1), (5, 17, 3), (37, 130, 16), (70, 264, 64), (18, 72, 100), (33, 40, 200)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape, dtype):
    M, K, R = shape
    x = sliced(M, K, dtype=dtype) + 3  # a mean far from 0
    down, d, weight, bias = dense(R, K, scale=K**-0.5), dense(R), dense(K), dense(K)
    return x, *(t.to(dtype).float() for t in (down, d, weight, bias))


def product(x, down, d, weight, bias):
    low = x.dtype
    return F.linear(
        F.layer_norm(x, x.shape[-1:], weight.to(low), bias.to(low)), down.to(low), d.to(low)
    )


@every_dtype
@every_shape
def test_rank_down_of_a_layer_norm_matches_fp64_oracle(shape, dtype):
    x, down, d, weight, bias = make(shape, dtype)
    t, h = rank_down(x, down, d, activation="relu", norm=(moments(x), weight, bias))
    inputs = (x, down, d, weight, bias)
    check(t, product(*inputs), product(*(i.double() for i in inputs)), dtype)
    assert torch.equal(h, t.clamp_min(0))


@every_dtype
@every_shape
@pytest.mark.parametrize("sequential", [False, True])
def test_norm_bwd_matches_fp64_oracle(shape, dtype, sequential):
    inputs = make(shape, dtype)
    dt, dy = dense(shape[0], shape[2], dtype=dtype), sliced(*shape[:2], dtype=dtype)

    def gradients(kind, wide):
        leaves = [t.detach().to(kind if i == 0 else wide) for i, t in enumerate(inputs)]
        leaves = [t.requires_grad_() for t in leaves]
        t = product(*leaves)
        dx, *small = torch.autograd.grad(t, leaves, dt.to(kind))
        return [dx + dy.to(kind) if sequential else dx, *small]

    x, down, d, weight, bias = inputs
    t = product(*inputs)
    dx, found = norm_bwd(dt, t, x, down, d, weight, bias, dy if sequential else None)
    assert torch.allclose(found, moments(x))
    actual = (dx, *norm_gradients(dt, x, found, down, weight, bias))
    for got, same, want in zip(
        actual, gradients(dtype, torch.float32), gradients(torch.float64, torch.float64)
    ):
        check(got, same, want, dtype)
    again = norm_gradients(dt, x, found, down, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(actual[1:], again))


@every_dtype
def test_the_gradient_of_one_element_is_exactly_zero(dtype):
    """Many rows: what is left of terms that cancel but for rounding would be seen in some."""
    M, R = 200, 40
    x, dt, t = (dense(M, n, dtype=dtype) for n in (1, R, R))
    down, weight, bias = dense(R, 1), dense(1), dense(1)
    assert not norm_bwd(dt, t, x, down, None, weight, bias, None)[0].any()
    dy = dense(M, 1, dtype=dtype)
    assert torch.equal(norm_bwd(dt, t, x, down, None, weight, bias, dy)[0], dy)


def test_no_rows_is_no_work():
    x, down, d, weight, bias = make((0, 24, 4), torch.float32)
    dt = dense(0, 4)
    dx, found = norm_bwd(dt, dt, x, down, d, weight, bias, None)
    assert dx.shape == (0, 24) and found.shape == (2, 0)
    assert not any(grad.any() for grad in norm_gradients(dt, x, found, down, weight, bias))
