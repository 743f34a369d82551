"""rank_down, rank_up and their backward, kernel by kernel."""

import pytest
import torch

from pelt_fast.kernels.mask import mask_bits
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.ops.common.activations import ACTIVATIONS, activate, derivative
from pelt_fast.ops.common.dropout import dropout

from .judge import DTYPES, check, dense, seed, sliced

# M, K (or N), R: nothing divides anything
SHAPES = [
    (1, 1, 1),
    (5, 17, 3),
    (37, 130, 8),
    (70, 300, 16),
    (33, 264, 64),
    (18, 72, 100),
    (9, 40, 512),
    (3, 24, 1024),
]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=IDS)
with_dropout = pytest.mark.parametrize("p", [0.0, 0.3])


def f64(*tensors):
    return (t.double() for t in tensors)


@every_dtype
@every_shape
@with_dropout
def test_rank_down_matches_fp64_oracle(shape, dtype, p):
    M, K, R = shape
    x, a = sliced(M, K, dtype=dtype), dense(R, K, scale=K**-0.5)
    bias, row = dense(R), seed() if p else None

    def expression(x, a, bias):
        return dropout(x, p, row) @ a.to(x.dtype).t() + bias.to(x.dtype)

    s, h = rank_down(x, a, bias, dropout_p=p, seed=row)
    assert h is None
    a = a.to(dtype)
    same, oracle = expression(x, a, bias), expression(*f64(x, a, bias.to(dtype)))
    check(s, same, oracle, dtype)
    check(rank_down(x, a.float(), bias, dropout_p=p, seed=row)[0], same, oracle, dtype)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rank_down_gives_the_dropped_activation(activation, dtype):
    x, a, bias, row = sliced(21, 40, dtype=dtype), dense(12, 40), dense(12), seed()
    s, h = rank_down(x, a, bias, activation=activation, h_dropout_p=0.25, h_seed=row)
    expected = dropout(activate(activation, s.double()), 0.25, row)
    check(h, dropout(activate(activation, s), 0.25, row), expected, dtype)
    assert torch.equal(h == 0, (expected == 0) | (h == 0))


@every_dtype
@every_shape
@with_dropout
def test_rank_down_bwd_matches_fp64_oracle(shape, dtype, p):
    M, K, R = shape
    x, ds, row = sliced(M, K, dtype=dtype), sliced(M, R, dtype=dtype), seed() if p else None
    da, d_bias = rank_down_bwd(ds, x, torch.float32, dropout_p=p, seed=row, with_bias=True)
    wide = (ds.double().t() @ dropout(x.double(), p, row), ds.double().sum(0))
    check(da, ds.float().t() @ dropout(x.float(), p, row), wide[0], torch.float32)
    check(d_bias, ds.float().sum(0), wide[1], torch.float32)
    assert torch.equal(da, rank_down_bwd(ds, x, torch.float32, dropout_p=p, seed=row)[0])


@every_dtype
@every_shape
@pytest.mark.parametrize("drop", ["", "base", "update"])
@pytest.mark.parametrize("in_place", [False, True])
def test_rank_up_matches_fp64_oracle(shape, dtype, drop, in_place):
    M, N, R = shape
    h, b, bias = sliced(M, R, dtype=dtype), dense(N, R, scale=R**-0.5), dense(N)
    base, row = sliced(M, N, dtype=dtype), seed() if drop else None

    def expression(h, b, bias, base):
        update = 0.5 * (h @ b.t())
        if drop == "update":
            update = dropout(update, 0.3, row)
        return dropout(base, 0.3 if drop == "base" else 0, row if drop == "base" else None) + (
            update + (0 if drop == "update" else 0.5 * bias)
        )

    b_low, bias_low = b.to(dtype), None if drop == "update" else bias.to(dtype)
    inputs = (h, b_low, bias_low if bias_low is not None else bias.to(dtype), base)
    expected, same = expression(*f64(*inputs)), expression(*inputs)
    out = base.clone() if in_place else None
    y = rank_up(
        h, b, base if out is None else out, scale=0.5, out=out,
        bias=None if drop == "update" else bias,
        base_dropout_p=0.3 * (drop == "base"), update_dropout_p=0.3 * (drop == "update"), seed=row,
    )  # fmt: skip
    check(y, same, expected, dtype)
    assert out is None or y is out


@every_dtype
def test_bits_are_the_mask_and_the_kernels_take_them(dtype):
    x, ds, a, dx, row = (
        dense(37, 72, dtype=dtype),
        dense(37, 5, dtype=dtype),
        dense(5, 72),
        dense(37, 72, dtype=dtype),
        seed(),
    )
    bits = mask_bits(row, 0.3, 37, 72)
    keep = dropout(torch.ones_like(dx), 0.3, row) != 0
    assert torch.equal(
        (bits[:, :, None] >> torch.arange(8, device=x.device)) & 1, keep.view(37, 9, 8).byte()
    )

    # another kernel than the one that draws the mask: the same numbers, not the same bits
    def expressions(ds, x, dx, a):
        return ds.t() @ dropout(x, 0.3, row), dx + dropout(ds @ a, 0.3, row)

    inputs = ds, x, dx, a.to(dtype)
    wanted = expressions(*f64(*inputs))
    same = expressions(*(t.float() for t in inputs))[0], expressions(*inputs)[1]
    for given in (bits, None):
        da, _ = rank_down_bwd(ds, x, torch.float32, dropout_p=0.3, seed=row, bits=given)
        made = rank_up(ds, a.t(), dx, update_dropout_p=0.3, seed=row, bits=given)
        check(da, same[0], wanted[0], torch.float32)
        check(made, same[1], wanted[1], dtype)


def test_rank_up_takes_a_transposed_factor():
    ds, a, base = dense(19, 5), dense(5, 33), dense(19, 33)
    y = rank_up(ds, a.t(), base)
    check(y, base + ds @ a, base.double() + ds.double() @ a.double(), torch.float32)


@every_dtype
@pytest.mark.parametrize(
    "shape", [s for s in SHAPES if s[2] <= 64], ids=[i for i, s in zip(IDS, SHAPES) if s[2] <= 64]
)
@with_dropout
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_rank_up_bwd_matches_fp64_oracle(shape, dtype, p, activation):
    M, N, R = shape
    dy, t, b = sliced(M, N, dtype=dtype), sliced(M, R, dtype=dtype), dense(N, R, scale=N**-0.5)
    row = seed() if p else None

    def expression(dy, t, b):
        h = dropout(activate(activation, t), p, row)
        dt = dropout(0.5 * (dy @ b), p, row) * derivative(activation, t)
        wide = torch.promote_types(dy.dtype, torch.float32)
        return dt, 0.5 * (dy.to(wide).t() @ h.to(wide)), 0.5 * dy.sum(0, dtype=wide)

    actual = rank_up_bwd(
        dy, t, b, scale=0.5, activation=activation, dropout_p=p, seed=row, need_bias=True
    )
    expected = expression(*f64(dy, t, b.to(dtype)))
    for got, same, want in zip(actual, expression(dy, t, b.to(dtype)), expected):
        check(got, same, want, dtype)


def test_rank_up_bwd_skips_what_is_not_needed():
    dy, t, b = dense(20, 33), dense(20, 4), dense(33, 4)
    dt, db, none = rank_up_bwd(dy, t, b, need_dt=False)
    assert dt is None and none is None
    check(db, dy.t() @ t, dy.double().t() @ t.double(), torch.float32)
    dt, db, none = rank_up_bwd(dy, t, b, need_db=False)
    assert db is None and none is None
    check(dt, dy @ b, dy.double() @ b.double(), torch.float32)


@pytest.mark.parametrize("width", [8, 64, 13])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_mask_is_bit_identical_to_the_reference(width, p):
    # base of ones and no update: what comes out is the mask itself
    base, row = torch.ones(50, width, device=seed().device), seed()
    zero = torch.zeros(50, 1, device=base.device), torch.zeros(width, 1, device=base.device)
    y = rank_up(*zero, base, base_dropout_p=p, seed=row)
    assert torch.equal(y != 0, dropout(base, p, row) != 0)


@with_dropout
def test_three_runs_give_the_same_bits(p):
    x, a, row = dense(65, 300, dtype=torch.float16), dense(8, 300), seed() if p else None
    dy, s, b = dense(65, 140, dtype=torch.float16), dense(65, 8, dtype=torch.float16), dense(140, 8)
    runs = [
        (
            rank_down(x, a, dropout_p=p, seed=row)[0],
            *rank_up_bwd(dy, s, b, need_bias=True),
            rank_down_bwd(s, x, torch.float32, dropout_p=p, seed=row)[0],
        )
        for _ in range(3)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


def test_no_rows_is_no_work():
    x, a = dense(0, 24), dense(4, 24)
    assert rank_down(x, a)[0].shape == (0, 4)
    assert rank_up(dense(0, 4), dense(10, 4), dense(0, 10)).shape == (0, 10)
    dt, db, d_bias = rank_up_bwd(dense(0, 10), dense(0, 4), dense(10, 4), need_bias=True)
    assert dt.shape == (0, 4) and not db.any() and not d_bias.any()
    assert not rank_down_bwd(dense(0, 4), x, torch.float32)[0].any()
