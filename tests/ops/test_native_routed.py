"""The C++ ops of many methods in one batch: against fp64 on every instruction set, with segments of
every kind, the same bits on any number of threads, and refusals that name the argument.

A batch holds whole blocks, short ones, gathered ones, rows of none, a method of a rank that is not
theirs and one without rows. What must not be read is NaN.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pelt_fast.ops.common import activations, native
from pelt_fast.ops.common.dropout import draw_seed, keep_mask, keep_scale, threshold
from tests.ops.exactly import DTYPES, close, padded

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
RANKS = [3, 16, 0, 128, 1, 200, 33, 8]
SCALES = [2.0, -0.5, 1.0, 0.25, 1.5, 3.0, 1.0, -1.0]
P = [0.3, 0.0, 0.2, 0.5, 0.1, 0.4, 0.25, 0.6]


class Batch(NamedTuple):
    """Segments, and the rows of each method in the order of its own rows."""

    rows: int
    segments: Tensor
    own: dict[int, Tensor]


def batch(lengths: list[int], methods: list[int], seed: int = 0) -> Batch:
    """Segments of these lengths and methods behind each other, a row of none between some, given
    in a random order."""
    generator = torch.Generator().manual_seed(seed)
    found, own, row = [], {}, 1
    for i, (length, method) in enumerate(zip(lengths, methods, strict=True)):
        before = own.setdefault(method, [])
        found.append([row, length, method, len(before)])
        before += range(row, row + length)
        row += length + i % 2
    order = torch.randperm(len(found), generator=generator)
    rows = {g: torch.tensor(r, dtype=torch.int64) for g, r in own.items() if g >= 0}
    segments = torch.tensor(found, dtype=torch.int64).view(-1, 4)
    return Batch(row + 1, segments[order], {g: r for g, r in rows.items() if len(r)})


BATCHES = {
    "few rows": batch([1, 2, 1, 3, 1, 1, 0], [0, 1, 3, 7, 6, 4, 2]),
    "gathered": batch([3, 5, 1, 7, 2, 4, 6, 9, 40, 1, 1], [1, 1, 7, 1, 7, 3, 3, 1, 6, 6, 0]),
    "whole blocks": batch([64, 130, 24, 8, 70, 5], [1, 3, 7, -1, 7, 5]),
    "several parts": batch([300, 700, 300, 64, 1], [0, 1, 1, 0, 0]),
    "one method": batch([77], [6]),
    "none": batch([5, 4], [-1, 2]),
}


def ours(b: Batch) -> dict[int, Tensor]:
    """The rows that the ops work on: their method has a rank of theirs."""
    return {g: rows for g, rows in b.own.items() if 1 <= RANKS[g] <= 128}


def masks(dropped: bool) -> tuple:
    """The ops' arguments."""
    if not dropped:
        return None, [], []
    seeds = draw_seed(torch.device("cpu"), len(P))
    return seeds, [threshold(p) for p in P], [keep_scale(p) for p in P]


def factor(drawn: tuple, g: int, rows: int, width: int) -> Tensor:
    """The mask of a method's own rows in fp64."""
    if drawn[0] is None or P[g] == 0:
        return torch.ones(rows, width).double()
    keep = keep_mask(0, rows * width, P[g], drawn[0][g]).view(rows, width)
    return keep.double() * keep_scale(P[g])


def firsts() -> list[int]:
    return [sum(RANKS[:g]) for g in range(len(RANKS))]


def narrow(b: Batch, dtype: torch.dtype) -> Tensor:
    """T or its gradient: NaN wherever no op may read."""
    t = torch.full((b.rows, max(RANKS) + 3), torch.nan, dtype=dtype)
    for g, rows in ours(b).items():
        t[rows, : RANKS[g]] = torch.randn(len(rows), RANKS[g]).to(dtype)
    return t


def all_close(pairs: list[tuple[Tensor, Tensor]], terms: int) -> None:
    """Of all methods at once: a single number may be what is left of large ones."""
    if pairs:
        close(*(torch.cat([t.reshape(-1) for t in each]) for each in zip(*pairs)), terms)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("small", [torch.float32, torch.bfloat16], ids=["fp32 factors", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 37, 128, 200, 1100])
@pytest.mark.parametrize("b", BATCHES.values(), ids=BATCHES)
def test_routed_down(b, k, dtype, small, dropped):
    x, down = padded(b.rows, k, dtype=dtype), torch.randn(sum(RANKS), k).to(small)
    bias, drawn = torch.randn(sum(RANKS)).to(small), masks(dropped)
    t = nan(b.rows, max(RANKS), dtype=dtype)
    native.ops().routed_down_(t, x, down, bias, b.segments, RANKS, *drawn)
    untouched, pairs = torch.ones_like(t, dtype=torch.bool), []
    for g, rows in ours(b).items():
        mine = slice(firsts()[g], firsts()[g] + RANKS[g])
        dropped_x = factor(drawn, g, len(rows), k) * x[rows].double()
        wanted = dropped_x @ down[mine].double().t() + bias[mine].double()
        pairs.append((t[rows, : RANKS[g]], wanted))
        untouched[rows, : RANKS[g]] = False
    all_close(pairs, k)
    assert t[untouched].isnan().all()
    bare = nan(*t.shape, dtype=dtype)
    native.ops().routed_down_(bare, x, down, None, b.segments, RANKS, *drawn)
    assert torch.equal(bare.isnan(), untouched)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 37, 128, 200])
@pytest.mark.parametrize("b", BATCHES.values(), ids=BATCHES)
def test_routed_down_backward(b, k, dtype, dropped):
    x, base, dt = padded(b.rows, k, dtype=dtype), padded(b.rows, k, dtype=dtype), narrow(b, dtype)
    small = torch.bfloat16 if k == 37 else torch.float32
    down, drawn = torch.randn(sum(RANKS), k).to(small), masks(dropped)

    def run(x, base, dx, d_down, d_biases):
        native.ops().routed_down_backward_(
            dt, x, base, down, dx, d_down, d_biases, b.segments, RANKS, *drawn
        )
        return dx, d_down, d_biases

    sums = sum(RANKS)
    dx, d_down, d_biases = run(x, base, nan(b.rows, k, dtype=dtype), nan(sums, k), nan(sums))
    alone, _, _ = run(None, None, nan(b.rows, k, dtype=dtype), None, None)
    wanted, zeros = base.double(), torch.zeros(b.rows, k).double()
    weights, biases = torch.zeros(sums, k).double(), torch.zeros(sums).double()
    for g, rows in ours(b).items():
        mine = slice(firsts()[g], firsts()[g] + RANKS[g])
        mask, mine_dt = factor(drawn, g, len(rows), k), dt[rows, : RANKS[g]].double()
        wanted[rows] += mask * (mine_dt @ down[mine].double())
        zeros[rows] = mask * (mine_dt @ down[mine].double())
        weights[mine] = mine_dt.t() @ (mask * x[rows].double())
        biases[mine] = mine_dt.sum(0)
    close(d_down, weights, b.rows)
    close(d_biases, biases, b.rows)
    close(dx, wanted, 128)
    close(alone, zeros, 128)
    assert not d_down[weights == 0].any() and torch.isfinite(d_down).all()
    assert torch.equal(run(None, base, torch.empty_like(dx), None, None)[0], dx)
    assert torch.equal(run(x, None, None, torch.empty_like(d_down), None)[1], d_down)
    assert torch.equal(run(None, None, None, None, torch.empty_like(d_biases))[2], d_biases)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", ["identity", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 37, 128, 200])
@pytest.mark.parametrize("b", BATCHES.values(), ids=BATCHES)
def test_routed_up(b, n, dtype, name, dropped):
    small = torch.bfloat16 if n == 37 else torch.float32
    base, t, drawn = padded(b.rows, n, dtype=dtype), narrow(b, dtype), masks(dropped)
    up, bias = torch.randn(sum(RANKS) * n).to(small), torch.randn(len(RANKS), n).to(small)
    settings = (RANKS, SCALES, activations.ACTIVATIONS.index(name), *drawn)
    y = nan(b.rows, n, dtype=dtype)
    native.ops().routed_up_(y, base, t, up, bias, b.segments, *settings)
    bare = native.ops().routed_up_(y.clone(), base, t, up, None, b.segments, *settings)
    dy, sums = padded(b.rows, n, dtype=dtype), up.numel()
    dt, d_up, d_bias = nan(*t.shape, dtype=dtype), nan(sums), nan(len(RANKS), n)
    native.ops().routed_up_backward_(dy, t, up, dt, d_up, d_bias, b.segments, *settings)
    others = torch.ones(b.rows, dtype=torch.bool)
    untouched = torch.ones_like(t, dtype=torch.bool)
    rest, pairs = torch.ones(sums, dtype=torch.bool), {name: [] for name in "yutwb"}
    for g, rows in ours(b).items():
        rank, mine = RANKS[g], slice(firsts()[g] * n, (firsts()[g] + RANKS[g]) * n)
        weight, mask = up[mine].view(n, rank).double(), factor(drawn, g, len(rows), rank)
        kept, above = t[rows, :rank].double(), dy[rows].double()
        h = mask * activations.activate(name, kept)
        update = SCALES[g] * h @ weight.t()
        pairs["u"].append((bare[rows], base[rows].double() + update))
        update = update + SCALES[g] * bias[g].double()
        pairs["y"].append((y[rows], base[rows].double() + update))
        slope = mask * activations.derivative(name, kept)
        pairs["t"].append((dt[rows, :rank], SCALES[g] * (above @ weight) * slope))
        pairs["w"].append((d_up[mine].view(n, rank), SCALES[g] * above.t() @ h))
        pairs["b"].append((d_bias[g], SCALES[g] * above.sum(0)))
        others[rows], untouched[rows, :rank], rest[mine] = False, False, False
    for each in pairs.values():
        all_close(each, max(n, b.rows, 128))
    assert torch.equal(y[others], base[others]) and torch.equal(bare[others], base[others])
    assert dt[untouched].isnan().all() and not d_up[rest].any()
    assert not d_bias[[g for g in range(len(RANKS)) if g not in ours(b)]].any()
    for i in range(3):
        one = [torch.empty_like(each) if j == i else None for j, each in
               enumerate((dt, d_up, d_bias))]  # fmt: skip
        native.ops().routed_up_backward_(dy, t, up, *one, b.segments, *settings)
        torch.testing.assert_close(one[i][~untouched] if i == 0 else one[i],
                                   (dt[~untouched], d_up, d_bias)[i], rtol=0, atol=0)  # fmt: skip


def test_the_order_of_the_segments_changes_no_bit():
    b = BATCHES["gathered"]
    found = []
    for order in (torch.arange(len(b.segments)), torch.randperm(len(b.segments))):
        torch.manual_seed(1)
        found.append(results(b._replace(segments=b.segments[order])))
    assert all(map(torch.equal, *found))


def results(b: Batch) -> list[Tensor]:
    """Every op once; zeros where nothing is written."""
    k, n, sums = 136, 72, sum(RANKS)
    x, base, dy = torch.randn(b.rows, k), torch.randn(b.rows, n), torch.randn(b.rows, n)
    down, up = torch.randn(sums, k), torch.randn(sums * n)
    drawn = masks(True)
    t, dt, dx = (torch.zeros(b.rows, w) for w in (max(RANKS), max(RANKS), k))
    y, d_up, d_down = torch.empty(b.rows, n), torch.empty(sums * n), torch.empty(sums, k)
    d_biases, d_up_biases = torch.empty(sums), torch.empty(len(RANKS), n)
    ops = native.ops()
    ops.routed_down_(t, x, down, None, b.segments, RANKS, *drawn)
    ops.routed_up_(y, base, t, up, None, b.segments, RANKS, SCALES, 4, *drawn)
    settings = (b.segments, RANKS, SCALES, 4, *drawn)
    ops.routed_up_backward_(dy, t, up, dt, d_up, d_up_biases, *settings)
    ops.routed_down_backward_(dt, x, None, down, dx, d_down, d_biases, b.segments, RANKS, *drawn)
    return [t, y, dt, d_up, d_up_biases, dx, d_down, d_biases]


@pytest.mark.parametrize("name", ["gathered", "several parts"])
def test_the_same_bits_on_any_number_of_threads(name):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(2)
            found.append(results(BATCHES[name]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_no_rows_are_no_work():
    where, ranks = torch.empty(0, 4, dtype=torch.int64), [3, 2]
    none = (None, [], [])
    native.ops().routed_down_(torch.empty(0, 3), torch.empty(0, 8), torch.randn(5, 8), None, where,
                              ranks, *none)  # fmt: skip
    d_down = nan(5, 8)
    native.ops().routed_down_backward_(torch.empty(0, 3), torch.empty(0, 8), None,
                                       torch.randn(5, 8), torch.empty(0, 8), d_down, None, where,
                                       ranks, *none)  # fmt: skip
    assert torch.equal(d_down, torch.zeros(5, 8))


def down(o, where, ranks=(3, 2), t=None, weight=None, biases=None, masks=(None, [], [])):
    x, t = torch.randn(6, 8), torch.empty(6, 3) if t is None else t
    weight = torch.randn(5, 8) if weight is None else weight
    o.routed_down_(t, x, weight, biases, torch.tensor(where).view(-1, 4), list(ranks), *masks)


def up(o, **changes):
    where = torch.tensor([[0, 6, 0, 0]])
    given = dict(scales=[1.0, 1.0], activation=0, biases=None, t=torch.randn(6, 3)) | changes
    o.routed_up_(torch.empty(6, 4), torch.randn(6, 4), given["t"], torch.randn(20), given["biases"],
                 where, [3, 2], given["scales"], given["activation"], None, [], [])  # fmt: skip


def up_backward(o, t, d_up):
    o.routed_up_backward_(torch.randn(6, 4), t, torch.randn(20), None, d_up, None,
                          torch.tensor([[0, 6, 0, 0]]), [3, 2], [1.0, 1.0], 0, None, [], [])  # fmt: skip


@pytest.mark.parametrize("call, said", [
    (lambda o: down(o, [[0, 7, 0, 0]]), r"segments must lie in 6 rows .* got \(0, 7, 0, 0\)"),
    (lambda o: down(o, [[-1, 2, 0, 0]]), r"segments must lie in 6 rows .* got \(-1, 2, 0, 0\)"),
    (lambda o: down(o, [[0, 2**62, 0, 0]]), "segments must lie in 6 rows"),
    (lambda o: down(o, [[0, 2, 2, 0]]), "of a method from -1 to 1, got"),
    (lambda o: down(o, [[0, 2, 0, -1]]), "segments must lie in 6 rows"),
    (lambda o: down(o, [[0, 3, 0, 0], [2, 2, 1, 0]]), "segments must be disjoint, got two with row 2"),
    (lambda o: down(o, [0.0, 1.0, 0.0, 0.0]), r"segments must be contiguous int64 \(S, 4\)"),
    (lambda o: down(o, [0, 1, 0, 0], ranks=(3, -2)), "ranks must be at least 0, got -2"),
    (lambda o: down(o, [0, 1, 0, 0], t=torch.empty(6, 2)), "t must have at least 3 columns, got 2"),
    (lambda o: down(o, [0, 1, 0, 0], t=torch.empty(5, 3)), r"t must have shape \(6, K\), got \(5, 3\)"),
    (lambda o: down(o, [0, 1, 0, 0], weight=torch.randn(4, 8)), "down must be .* 40 elements"),
    (lambda o: down(o, [0, 1, 0, 0], weight=torch.randn(8, 5).t()), "down must be contiguous"),
    (lambda o: down(o, [0, 1, 0, 0], weight=torch.randn(5, 8).double()), "down must be float32, bf"),
    (lambda o: down(o, [0, 1, 0, 0], biases=torch.randn(4)), "biases must be .* 5 elements"),
    (lambda o: down(o, [0, 1, 0, 0], masks=(torch.zeros(2, 2), [1, 1], [1.0, 1.0])),
     r"seeds must be contiguous int64 \(2, 2\)"),
    (lambda o: down(o, [0, 1, 0, 0], masks=(torch.zeros(2, 2).long(), [1], [1.0])),
     "thresholds and keep_scales must have 2 items, got 1 and 1"),
    (lambda o: down(o, [0, 1, 0, 0], masks=(torch.zeros(2, 2).long(), [1, 70000], [1.0, 1.0])),
     "threshold must be in"),
    (lambda o: up(o, scales=[1.0]), "scales must have 2 items, got 1"),
    (lambda o: up(o, activation=6), "activation must be 0 to 5, got 6"),
    (lambda o: up(o, biases=torch.randn(4)), "biases must be .* 8 elements"),
    (lambda o: up(o, t=torch.randn(6, 3).half()), "t must have dtype number"),
    (lambda o: up_backward(o, None, torch.empty(20)), "t is missing"),
    (lambda o: up_backward(o, torch.randn(6, 3), torch.empty(19)), "d_up must be .* 20 elements"),
], ids=lambda v: v[:24] if isinstance(v, str) else "")  # fmt: skip
def test_a_wrong_argument_is_named(call, said):
    with pytest.raises(RuntimeError, match=said):
        call(native.ops())
