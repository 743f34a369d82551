"""The kernels of many methods in one batch against the specification, whatever the routes."""

import pytest
import torch
from torch import Tensor

from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
)
from pelt_fast.ops.common.parts import widest
from pelt_fast.ops.routed import gpu, reference
from pelt_fast.ops.routed.segments import segments_of

from .judge import DEVICE, DTYPES, check, dense, seed, sliced

EACH, K, N = 5, 40, 70
RANKS, ALIGNED = [1, 3, 16, 100, 0, 2], [8, 16, 64, 104, 0, 8]  # nobody's route is the last
SCALES, P = [2.0, -0.5, 1.0, 0.25, 3.0, 1.0], [0.3, 0.0, 0.5, 0.1, 0.2, 0.1]
ROUTES = {
    "unsorted": [3, 0, -1, 1, 0, 2, 4, 3, 0, 0],
    "one": [2, 2, 2],
    "none": [-1, 4],
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_routes = pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
with_dropout = pytest.mark.parametrize("p", [False, True], ids=["", "dropped"])
# LoRA without dropout, adapters with it; ranks that 8 divides are read and drawn 8 at a time
CASES = {
    "lora": (RANKS, "identity", False, False),
    "adapter": (RANKS, "gelu", True, True),
    "aligned": (ALIGNED, "relu", False, True),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def merged(routes, ranks=RANKS) -> Segments:
    """Segments of several lengths, and none for the rows of none."""
    where = segments_of(torch.tensor(routes, dtype=torch.int64), len(routes) * EACH, ranks)
    return Segments(where.segments.to(DEVICE), ranks)


def apart(routes, ranks=RANKS) -> Segments:
    """A segment for every route, as a GPU has them, in the order of the batch."""
    table = [
        [b * EACH, EACH, g, routes[:b].count(g) * EACH] for b, g in enumerate(routes)
    ]  # fmt: skip
    return Segments(torch.tensor(table, dtype=torch.int64, device=DEVICE).view(-1, 4), ranks)


def drop(p: bool) -> RoutedDropout:
    seeds = torch.stack([seed() + g for g in range(len(P))]) if p else None
    return RoutedDropout(P if p else [], seeds)


def factors(ranks, biases: bool) -> tuple[RoutedDown, RoutedUp]:
    total = sum(ranks)
    down, up = dense(total, K, scale=K**-0.5), dense(N * total, scale=0.3)
    d, u = (dense(total), dense(len(ranks), N)) if biases else (None, None)
    return RoutedDown(down, d), RoutedUp(up, u)


def as_type(bundle, dtype):
    return type(bundle)(*(None if t is None else t.to(dtype) for t in bundle))


def written(t: Tensor, routes, ranks) -> Tensor:
    """T with zeros where nothing may read it."""
    own = [0 if g < 0 else ranks[g] for g in routes for _ in range(EACH)]
    own = torch.tensor(own, device=t.device)
    return torch.where(torch.arange(t.shape[1], device=t.device) < own[:, None], t, 0)


@every_dtype
@every_routes
@with_dropout
def test_routed_down_matches_fp64_oracle(routes, p, dtype):
    x, (down, _), mask = sliced(len(routes) * EACH, K, dtype=dtype), factors(RANKS, True), drop(p)
    low, where = as_type(down, dtype), merged(routes)
    oracle = reference.down_forward(x.double(), as_type(low, torch.double), where, mask)
    same = reference.down_forward(x, low, where, mask)
    for where in (merged(routes), apart(routes)):
        t = gpu.down_forward(x, down, where, mask)
        assert t.dtype == dtype
        check(*(written(t, routes, RANKS) for t in (t, same, oracle)), dtype)


@every_dtype
@every_routes
@every_case
def test_routed_up_matches_fp64_oracle(case, routes, dtype):
    ranks, activation, biases, p = case
    rows, (_, up), mask = len(routes) * EACH, factors(ranks, biases), drop(p)
    base, t = sliced(rows, N, dtype=dtype), sliced(rows, widest(ranks), dtype=dtype)
    low, transform = as_type(up, dtype), RoutedTransform(activation, SCALES)
    wide = (base.double(), t.double(), as_type(low, torch.double))
    settings = merged(routes, ranks), transform, mask
    oracle, same = (reference.up_forward(*given, *settings) for given in (wide, (base, t, low)))
    for where in (merged(routes, ranks), apart(routes, ranks)):
        y = gpu.up_forward(base, t, up, where, transform, mask)
        check(y, same, oracle, dtype)
        none = torch.tensor([g < 0 or ranks[g] == 0 for g in routes for _ in range(EACH)])
        assert torch.equal(y[none], base[none]) and y is not base


@every_dtype
@every_routes
@with_dropout
def test_routed_down_bwd_matches_fp64_oracle(routes, p, dtype):
    rows, weights, mask = len(routes) * EACH, factors(RANKS, False)[0].down_weights, drop(p)
    x, base = sliced(rows, K, dtype=dtype), sliced(rows, K, dtype=dtype)
    dt, needs = sliced(rows, max(RANKS), dtype=dtype), [True] * 3
    given, where = (dt, x, base, weights.to(dtype).float()), merged(routes)
    oracle = reference.down_backward(*(g.double() for g in given), where, mask, needs)
    same = reference.down_backward(*given, where, mask, needs)
    for where in (merged(routes), apart(routes)):
        found = gpu.down_backward(dt, x, base, weights, where, mask, needs)
        for grad, torchs, wanted, low in zip(found, same, oracle, (dtype, dtype, torch.float32)):
            check(grad, torchs, wanted, low)


@every_dtype
@every_routes
@every_case
def test_routed_up_bwd_matches_fp64_oracle(case, routes, dtype):
    ranks, activation, _, p = case
    rows, weights, mask = len(routes) * EACH, factors(ranks, False)[1].up_weights, drop(p)
    dy, t = sliced(rows, N, dtype=dtype), sliced(rows, widest(ranks), dtype=dtype)
    settings, needs = (RoutedTransform(activation, SCALES), mask), [True] * 3
    given, where = (dy, t, weights.to(dtype).float()), merged(routes, ranks)
    oracle = reference.up_backward(*(g.double() for g in given), where, *settings, needs)
    same = reference.up_backward(*given, where, *settings, needs)
    for where in (merged(routes, ranks), apart(routes, ranks)):
        found = gpu.up_backward(dy, t, weights, where, *settings, needs)
        check(*(written(grads[0], routes, ranks) for grads in (found, same, oracle)), dtype)
        for grad, torchs, wanted in zip(found[1:], same[1:], oracle[1:]):
            check(grad, torchs, wanted, dtype)


@every_dtype
def test_masks_are_those_of_a_method_alone_and_runs_give_the_same_bits(dtype):
    """x of ones, D and U of one: what comes out is the masks of each method's own rows."""
    routes, ranks = [1, -1, 0, 1], [1, 1]
    rows, mask = len(routes) * EACH, RoutedDropout([0.3, 0.5], torch.stack([seed(), seed() + 1]))
    where, one = apart(routes, ranks), RoutedUp(torch.ones(2 * N, device=DEVICE), None)
    ones = torch.ones(rows, N, dtype=dtype, device=DEVICE)
    plain, transform = RoutedDropout([], None), RoutedTransform("identity", [1.0, 1.0])
    hidden = gpu.up_forward(torch.zeros_like(ones), ones[:, :1], one, where, transform, mask)
    wanted = reference.up_forward(torch.zeros_like(ones), ones[:, :1], one, where, transform, mask)
    assert torch.equal(hidden != 0, wanted != 0)
    given = ones[:, :1], ones, None, one.up_weights.view(2, N), where, mask, [True] * 3
    dx, *weights = gpu.down_backward(*given)
    wanted, *_ = reference.down_backward(*given)
    assert torch.equal(dx != 0, wanted != 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, gpu.down_backward(*given)[1:]))
    given = ones, ones[:, :1], one.up_weights, where, transform, plain, [True] * 3
    runs = [gpu.up_backward(*given)[1:] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_batch_of_nothing_is_left_to_the_library():
    down, where = RoutedDown(dense(4, K), None), apart([], [4])
    assert gpu.down_forward(dense(0, K), down, where, RoutedDropout([], None)) is NotImplemented
