"""The C++ ops of a few rows or queries, a decoder's step: against fp64, and refusals that name the
argument. ``test_native_products`` runs this file on every instruction set."""

import pytest
import torch

from pelt_fast.ops.common import native
from tests.ops.exactly import DTYPES, close, padded, prefix_reference

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b, h, g, t, d, p, s", [
    (1, 1, 1, 1, 16, 1, 1), (2, 4, 2, 1, 64, 30, 33), (1, 12, 12, 3, 64, 16, 700),
    (3, 2, 1, 8, 128, 256, 257),
])  # fmt: skip
def test_prefix_of_a_few_queries(b, h, g, t, d, p, s, dtype):
    q, (context_k, context_v) = torch.randn(b, t, h, d), torch.randn(2, b, s, g, d)
    q, context_k, context_v = (x.to(dtype).transpose(1, 2) for x in (q, context_k, context_v))
    k, v, scale = torch.randn(g, p, d), torch.randn(g, p, d), d**-0.5
    wide = [x.double().repeat_interleave(h // g, 1) for x in (context_k, context_v)]
    scores = scale * q.double() @ wide[0].transpose(-1, -2)
    fixed = torch.softmax(scores, -1) @ wide[1], torch.logsumexp(scores, -1)
    wanted, joint = prefix_reference(
        q.double(), *fixed, k.double(), v.double(), scale, relu=False, gated=True
    )
    o, lse = torch.empty_like(q), torch.empty(b, h, t)
    native.ops().prefix_few_queries_(o, lse, q, context_k, context_v, k, v, scale)
    close(o, wanted, d + p + s)
    close(lse, joint, d + p + s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("m, k, n", [
    (1, 1, 1), (1, 300, 17), (3, 13, 70), (8, 129, 64), (5, 3000, 768), (2, 768, 3000),
])  # fmt: skip
def test_product_of_a_few_rows(m, k, n, biased, columns, dtype):
    x, out = padded(m, k, dtype=dtype), padded(m, n, dtype=dtype)
    w = padded(n, k, dtype=dtype).t() if columns else padded(k, n, dtype=dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    native.ops().few_rows_product_(out, x, w, bias)
    close(out, x.double() @ w.double() + (bias.double() if biased else 0), k)


@pytest.mark.parametrize("call, said", [
    (lambda o: o.prefix_few_queries_(
        torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9), torch.randn(1, 2, 9, 16),
        *torch.randn(2, 1, 2, 9, 16), *torch.randn(2, 2, 5, 16), 1.0),
     "q must have at most 8 queries of a multiple of 16"),
    (lambda o: o.prefix_few_queries_(
        torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1), torch.randn(1, 2, 1, 16),
        *torch.randn(2, 1, 3, 9, 16), *torch.randn(2, 2, 5, 16), 1.0),
     r"context_k must have shape \(1, 2, S, 16\)"),
    (lambda o: o.few_rows_product_(torch.empty(9, 4), torch.randn(9, 8), torch.randn(8, 4), None),
     "x must have at most 8 rows, got 9"),
    (lambda o: o.few_rows_product_(torch.empty(1, 4), torch.randn(1, 8), torch.randn(7, 4), None),
     r"w must have shape \(8, N\)"),
    (lambda o: o.few_rows_product_(torch.empty(1, 4), torch.randn(1, 8), torch.randn(8, 4),
                                   torch.randn(5)), r"bias must be contiguous \(4\)"),
])  # fmt: skip
def test_bad_arguments_are_named(call, said):
    with pytest.raises(RuntimeError, match=said):
        call(native.ops())
