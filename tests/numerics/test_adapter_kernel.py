"""The adapter in one kernel, LayerNorm included, against fp64."""

import pytest
import torch
from torch.nn import functional as F

from pelt_fast.kernels.adapter import adapter
from pelt_fast.ops.adapter import gpu as adapter_gpu
from pelt_fast.ops.common.dropout import dropout
from tests.flat import gpu as fused

from .judge import DTYPES, check, dense, seed, sliced

# M, K, N, R
SHAPES = [(1, 1, 1, 1), (5, 17, 23, 3), (37, 130, 44, 16), (40, 264, 136, 64), (18, 72, 50, 100)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_adapter_matches_fp64_oracle(shape, dtype, norm, p):
    M, K, N, R = shape
    # a mean far from 0: what a one-pass variance gets wrong
    x = sliced(M, K, dtype=dtype) + 3 * norm
    base, row = sliced(M, N, dtype=dtype), seed() if p else None
    down, up = dense(R, K, scale=K**-0.5), dense(N, R, scale=R**-0.5)
    small = [t.to(dtype).float() for t in (down, dense(R), up, dense(N))]
    weights = [t.to(dtype).float() for t in (dense(K), dense(K))]

    def expression(x, base, down, d, up, u, weight, shift):
        low = x.dtype
        v = F.layer_norm(x, (K,), weight.to(low), shift.to(low)) if norm else x
        t = F.linear(v, down.to(low), d.to(low))
        h = dropout(F.gelu(t), p, row)
        return base + 0.5 * F.linear(h, up.to(low), u.to(low)), t

    settings = dict(activation="gelu", scale=0.5, dropout_p=p, seed=row)
    y, t = adapter(x, base, *small, norm=tuple(weights) if norm else None, **settings)
    inputs = (x, base, *small, *weights)
    same, wanted = expression(*inputs), expression(*(i.double() for i in inputs))
    check(y, same[0], wanted[0], dtype)
    check(t, same[1], wanted[1], dtype)
    again, none = adapter(
        x, base, *small, norm=tuple(weights) if norm else None, keep_t=False, **settings
    )
    assert none is None
    check(again, same[0], wanted[0], dtype)


@pytest.mark.parametrize("norm", ["none", "in"])
def test_one_kernel_and_two_agree(monkeypatch, norm):
    x, down, up, base = dense(40, 64), dense(8, 64), dense(48, 8), dense(40, 48)
    norms = (None, None) if norm == "none" else (dense(64), dense(64))
    small = (down, dense(8), up, dense(48), *norms)
    results = []
    for rows in (0, 1 << 20):
        monkeypatch.setattr(adapter_gpu, "ROWS_A_PROCESSOR", rows)
        results.append(fused.adapter_forward(x, base, *small, norm, "relu", 2.0, 0.1, seed(), True))
    for one, two in zip(*results):
        check(one, two, two.double(), torch.float32)
