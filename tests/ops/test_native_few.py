"""The C++ ops of a few rows or queries, a decoder's step: against fp64, and refusals that name the
argument. ``test_native_products`` runs this file on every instruction set."""

import pytest
import torch

from pelt_fast.ops.common import native
from pelt_fast.ops.common.activations import ACTIVATIONS, activate
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
    (9, 70, 33), (31, 130, 300), (32, 771, 3000),
])  # fmt: skip
def test_product_of_a_few_rows(m, k, n, biased, columns, dtype):
    x, out = padded(m, k, dtype=dtype), padded(m, n, dtype=dtype)
    w = padded(n, k, dtype=dtype).t() if columns else padded(k, n, dtype=dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    native.ops().few_rows_product_(out, x, w, bias)
    close(out, x.double() @ w.double() + (bias.double() if biased else 0), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_as_it_is(dtype):
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    w, x = torch.zeros(1 << 16, 21, dtype=dtype), torch.zeros(1, 21, dtype=dtype)
    for column in (3, 20):  # in a whole vector, and in what is left of the row
        w.zero_()[:, column], x.zero_()[0, column] = numbers, 1
        out = torch.empty(1, 1 << 16, dtype=dtype)
        native.ops().few_rows_product_(out, x, w.t(), None)
        torch.testing.assert_close(out[0], numbers, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, n, r, biased, activation", [
    (1, 1, 1, 1, False, "identity"), (1, 300, 17, 3, True, "relu"), (3, 13, 70, 16, True, "gelu"),
    (8, 129, 64, 100, False, "silu"), (5, 768, 3000, 128, True, "tanh"),
    (4, 640, 96, 17, True, "gelu_tanh"), (2, 96, 80, 517, True, "relu"),
    (11, 530, 40, 33, True, "relu"), (32, 96, 300, 600, False, "gelu"),
])  # fmt: skip
def test_update_of_a_few_rows(m, k, n, r, biased, activation, dtype, weights):
    x, base, out = padded(m, k, dtype=dtype), padded(m, n, dtype=dtype), padded(m, n, dtype=dtype)
    t, down, up = (
        padded(m, r, dtype=dtype),
        padded(r, k, dtype=weights),
        padded(n, r, dtype=weights),
    )
    down, up = down.div_(k**0.5), up.div_(r**0.5)
    biases = [torch.randn(size).to(weights) if biased else None for size in (r, n)]
    d, u = (0 if bias is None else bias.double() for bias in biases)
    pre = x.double() @ down.double().t() + d
    wanted = base.double() + 0.5 * (activate(activation, pre) @ up.double().t() + u)
    number = ACTIVATIONS.index(activation)
    update = native.ops().few_rows_update_
    update(out, t, base, x, down, biases[0], up, biases[1], 0.5, number)
    close(t, pre, k)
    close(out, wanted, k + r)
    update(base, None, base, x, down, biases[0], up, biases[1], 0.5, number)
    assert torch.equal(base, out), "over the base: the same bits"


def products(rows: int) -> list[torch.Tensor]:
    """Of each op of a few rows: the weight stored either way, and the update."""
    torch.manual_seed(rows)
    x, down, up = torch.randn(rows, 3000), torch.randn(128, 3000), torch.randn(3000, 128)
    base, by_columns, by_rows = torch.ones(rows, 3000), *torch.empty(2, rows, 128)
    ops = native.ops()
    ops.few_rows_update_(base, None, base, x, down, None, up, None, 1.0, 1)
    ops.few_rows_product_(by_columns, x, down.t(), None)
    ops.few_rows_product_(by_rows, x, down.t().contiguous(), None)
    return [base, by_columns, by_rows]


@pytest.mark.parametrize("rows", [8, 32])
def test_a_few_rows_are_the_same_on_any_number_of_threads(rows):
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(products(rows))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


def updated(ops, **changed) -> None:
    """few_rows_update_ of two rows with ``changed`` arguments."""
    given = dict(
        out=torch.empty(2, 4), t=None, base=torch.randn(2, 4), x=torch.randn(2, 8),
        down=torch.randn(3, 8), down_bias=None, up=torch.randn(4, 3), up_bias=None, scale=1.0,
        activation=0,
    )  # fmt: skip
    ops.few_rows_update_(*(given | changed).values())


@pytest.mark.parametrize("call, said", [
    (lambda o: o.prefix_few_queries_(
        torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9), torch.randn(1, 2, 9, 16),
        *torch.randn(2, 1, 2, 9, 16), *torch.randn(2, 2, 5, 16), 1.0),
     "q must have at most 8 queries of a multiple of 16"),
    (lambda o: o.prefix_few_queries_(
        torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1), torch.randn(1, 2, 1, 16),
        *torch.randn(2, 1, 3, 9, 16), *torch.randn(2, 2, 5, 16), 1.0),
     r"context_k must have shape \(1, 2, S, 16\)"),
    (lambda o: o.few_rows_product_(torch.empty(33, 4), torch.randn(33, 8), torch.randn(8, 4),
                                   None), "x must have at most 32 rows, got 33"),
    (lambda o: o.few_rows_product_(torch.empty(1, 4), torch.randn(1, 8), torch.randn(7, 4), None),
     r"w must have shape \(8, N\)"),
    (lambda o: o.few_rows_product_(torch.empty(1, 4), torch.randn(1, 8), torch.randn(8, 4),
                                   torch.randn(5)), r"bias must be contiguous \(4\)"),
    (lambda o: updated(o, x=torch.randn(33, 8)), "x must have at most 32 rows, got 33"),
    (lambda o: updated(o, down=torch.randn(3, 7)), r"down must have shape \(M, 8\)"),
    (lambda o: updated(o, down=torch.randn(0, 8)), "the rank must be at least 1, got 0"),
    (lambda o: updated(o, up=torch.randn(4, 2)), r"up must have shape \(M, 3\)"),
    (lambda o: updated(o, up=torch.randn(3, 4).t()), "up must have contiguous rows"),
    (lambda o: updated(o, out=torch.empty(2, 5)), r"out must have shape \(2, 4\)"),
    (lambda o: updated(o, base=torch.empty(2, 4).half()), "base must have dtype number 6"),
    (lambda o: updated(o, t=torch.empty(2, 2)), r"t must have shape \(2, 3\)"),
    (lambda o: updated(o, down_bias=torch.randn(2)), r"down_bias must be contiguous \(3\)"),
    (lambda o: updated(o, up_bias=torch.randn(4).half()), r"up_bias must be contiguous \(4\)"),
    (lambda o: updated(o, activation=6), "activation must be 0 to 5, got 6"),
])  # fmt: skip
def test_bad_arguments_are_named(call, said):
    with pytest.raises(RuntimeError, match=said):
        call(native.ops())
