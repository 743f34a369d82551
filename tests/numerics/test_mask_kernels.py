"""The dropout mask, applied by a kernel of its own."""

import pytest
import torch

from pelt_fast.kernels.mask import dropout
from pelt_fast.ops.common import dropout as philox

from .judge import DTYPES, check, dense, seed, sliced

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize(
    "shape", [(1, 1), (5, 17), (37, 130), (9, 520)], ids=lambda shape: "x".join(map(str, shape))
)


@every_dtype
@every_shape
@pytest.mark.parametrize("wide_bias", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_with_a_bias_matches_fp64_oracle(shape, dtype, wide_bias, in_place):
    x, row = sliced(*shape, dtype=dtype), seed()
    bias = dense(shape[1], dtype=torch.float32 if wide_bias else dtype)

    def expression(x, bias):
        return philox.dropout(x, 0.3, row) + 0.5 * bias

    oracle, same = expression(x.double(), bias.double()), expression(x, bias.to(dtype))
    given = x.clone() if in_place else x
    out = dropout(given, 0.3, row, bias=bias, scale=0.5, out=given if in_place else None)
    check(out, same, oracle, dtype)
    assert (out is given) == in_place


@every_dtype
@every_shape
def test_dropout_drops_what_the_reference_drops(shape, dtype):
    x, row = sliced(*shape, dtype=dtype), seed()
    expected = philox.dropout(x.double(), 0.3, row)
    for out in (dropout(x, 0.3, row), dropout(x, 0.3, row, out=torch.empty_like(x))):
        check(out, philox.dropout(x, 0.3, row), expected, dtype)
        assert torch.equal(out == 0, expected == 0)
    # one exact number for each kept element and another for each dropped one: the mask's bits
    ones = torch.ones_like(x)
    kept = dropout(ones, 0.5, row, bias=ones[0], scale=2.0)
    assert torch.equal(kept == 4.0, philox.dropout(ones, 0.5, row) != 0)
    assert torch.equal(kept == 2.0, philox.dropout(ones, 0.5, row) == 0)


def test_no_seed_is_no_dropout():
    x = dense(3, 8)
    assert dropout(x, 0.3, None) is x
