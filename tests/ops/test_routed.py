"""Many methods in one batch: each row gets what its method gives it alone, and nothing else."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import pelt_fast
from pelt_fast import functional
from pelt_fast.ops.adapter.op import AdapterFunction
from pelt_fast.ops.beside.op import DownFunction, UpFunction
from pelt_fast.ops.common.bundles import (
    RoutedDown,
    RoutedDropout,
    RoutedTransform,
    RoutedUp,
    Segments,
)
from pelt_fast.ops.common.dropout import draw_seed, dropout
from pelt_fast.ops.routed.op import down_fwd, routed_update, up_fwd
from pelt_fast.ops.routed.segments import segments_of
from tests.ops.routed import (
    CPU,
    EACH,
    RANKS,
    ROUTES,
    SCALES,
    Factors,
    K,
    N,
    P,
    drops,
    factors,
    random,
)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Uninitialised memory is NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def own_rows(routes: list[int], method: int) -> Tensor:
    """The rows of a method, in their order."""
    rows = [b * EACH + i for b, route in enumerate(routes) if route == method for i in range(EACH)]
    return torch.tensor(rows, dtype=torch.int64)


def alone(x, base, f: Factors, g: int, activation, dropouts, biases: bool):
    """Method g alone on its rows, by the ops beside a layer."""
    one, two = (
        (0.0, None) if d.seeds is None or P[g] == 0 else (P[g], d.seeds[g]) for d in dropouts
    )
    d, u = (f.down_biases[g], f.up_biases[g]) if biases else (None, None)
    _, t = DownFunction.apply(x, f.downs[g], d, *one)
    return UpFunction.apply(base, t, f.ups[g], u, activation, SCALES[g], *two, 0.0, None)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("p", [False, True])
@pytest.mark.parametrize("activation, biases", [("identity", False), ("gelu", True)])
@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)
def test_each_row_gets_what_its_method_gives_it_alone(routes, activation, biases, p, backend):
    """Output and every gradient, masks included: exactly the same bits of the mask are drawn, so
    that nothing but the order of the sums is different."""
    f, dropouts, rows = factors(), drops(p), len(routes) * EACH
    x, base, dy = random(rows, K), random(rows, N), torch.randn(rows, N).double()
    where = segments_of(torch.tensor(routes, dtype=torch.int64), rows, RANKS)
    transform = RoutedTransform(activation, SCALES)
    with pelt_fast.backend(backend):
        y = routed_update(x, base, *f.stacked(biases), where, transform, *dropouts)
    leaves = [x, base, *f.leaves(biases)]
    found = [y, *torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True)]
    with pelt_fast.backend("reference"):
        out = base.clone()
        for g in {route for route in routes if route >= 0 and RANKS[route]}:
            mine = own_rows(routes, g)
            each = alone(x[mine], base[mine], f, g, activation, dropouts, biases)
            out = out.index_copy(0, mine, each)
        wanted = [
            out, *torch.autograd.grad(out, leaves, dy, allow_unused=True, materialize_grads=True)
        ]  # fmt: skip
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_mask_is_that_of_the_methods_own_rows(dtype, backend):
    routes, p, ranks = [1, 0, 1, -1, 0, 1], [0.3, 0.6], [K, K]
    where = segments_of(torch.tensor(routes), len(routes) * EACH, ranks)
    seeds = draw_seed(CPU, 2)
    x, eye = torch.ones(len(routes) * EACH, K, dtype=dtype), torch.eye(K, dtype=dtype)
    weights = torch.cat([eye, eye])
    t = down_fwd(x, weights, None, *where, p, seeds, backend=backend)
    for g in range(2):
        mine = own_rows(routes, g)
        assert torch.equal(t[mine], dropout(x[mine], p[g], seeds[g]))
    base, up = torch.zeros_like(x), torch.cat([eye.view(-1), eye.view(-1)])
    y = up_fwd(base, x, up, None, *where, "identity", [1.0, 1.0], p, seeds, backend=backend)
    for g in range(2):
        mine = own_rows(routes, g)
        assert torch.equal(y[mine], dropout(x[mine], p[g], seeds[g]))
    assert not y[own_rows(routes, -1)].any()


def test_an_adapter_gets_what_the_adapters_op_gives_it():
    """Adapters: no dropout of the input, one of the bottleneck, biases."""
    f, routes = factors(), ROUTES["unsorted"]
    rows, seeds = len(routes) * EACH, draw_seed(CPU, len(P))
    x, base = random(rows, K), random(rows, N)
    where = segments_of(torch.tensor(routes), rows, RANKS)
    y = routed_update(
        x, base, *f.stacked(True), where, RoutedTransform("relu", SCALES), RoutedDropout([], None),
        RoutedDropout(P, seeds),
    )  # fmt: skip
    for g, rank in enumerate(RANKS):
        mine, small = own_rows(routes, g), (f.downs[g], f.down_biases[g], f.ups[g], f.up_biases[g])
        wanted = base[mine]
        if rank and len(mine):
            settings = (None, None, "none", "relu", SCALES[g], P[g], seeds[g] if P[g] else None)
            wanted = AdapterFunction.apply(x[mine], base[mine], *small, *settings)
        torch.testing.assert_close(y[mine], wanted, rtol=1e-12, atol=1e-12)


def test_lora_and_adapters_of_the_public_functions_are_the_same():
    f, routes = factors(), torch.tensor([2, 0, -1, 3, 0, 1])
    x, weight = torch.randn(6, 4, K).double(), torch.randn(N, K).double()

    def layer(x):
        return x @ weight.t()

    bare = dict(scales=SCALES, training=False, input_dropout_p=0.2, dropout_p=0.1)
    lora = functional.routed_beside(x, layer, routes, f.downs, f.ups, **bare)
    biases = dict(down_biases=f.down_biases, up_biases=f.up_biases, activation="silu")
    adapter = functional.routed_beside(x, layer(x), routes, f.downs, f.ups, **bare, **biases)
    for i, g in enumerate(routes.tolist()):
        if g < 0:
            wanted = layer(x[i]), layer(x[i])
        else:
            wanted = (
                functional.lora_beside(x[i], layer, f.downs[g], f.ups[g], scale=SCALES[g]),
                functional.parallel_adapter(
                    layer(x[i]), x[i], f.downs[g], f.down_biases[g], f.ups[g], f.up_biases[g],
                    activation="silu", scale=SCALES[g],
                ),
            )  # fmt: skip
        torch.testing.assert_close(lora[i], wanted[0])
        torch.testing.assert_close(adapter[i], wanted[1])


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("p", [False, True])
@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_gradients_match_finite_differences(activation, p):
    ranks, routes = [1, 0, 3, 2], torch.tensor([2, 0, -1, 2, 3])
    f, where = factors(ranks), segments_of(routes, 10, ranks)
    dropouts = [RoutedDropout(P[:4], draw_seed(CPU, 4)) if p else RoutedDropout([], None)] * 2
    down, up = ([t.detach().requires_grad_() for t in half] for half in f.stacked(True))

    def run(x, base, *small):
        layer = x.tanh() @ torch.ones(K, N).double() + base
        halves = RoutedDown(*small[:2]), RoutedUp(*small[2:])
        return routed_update(
            x, lambda _: layer, *halves, where, RoutedTransform(activation, SCALES[:4]), *dropouts
        )  # fmt: skip

    for backend in ("reference", "auto"):
        with pelt_fast.backend(backend):
            assert gradcheck(run, (random(10, K), random(10, N), *down, *up), atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_one_gradient_alone_is_the_one_of_all(activation, which, backend):
    """x, base, D, d, U, u."""
    f, routes = factors(), ROUTES["unsorted"]
    rows, dropouts = len(routes) * EACH, drops(True)
    where = segments_of(torch.tensor(routes), rows, RANKS)
    x, base, dy = random(rows, K), random(rows, N), torch.randn(rows, N).double()
    tensors = [x, base, *(t for half in f.stacked(True) for t in half)]

    def gradients(needs):
        leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
        halves = RoutedDown(*leaves[2:4]), RoutedUp(*leaves[4:])
        with pelt_fast.backend(backend):
            y = routed_update(
                leaves[0], leaves[1], *halves, where, RoutedTransform(activation, SCALES), *dropouts
            )
        y.backward(dy)
        return [leaf.grad for leaf in leaves]

    needs = [i == which for i in range(6)]
    found = gradients(needs)
    assert [grad is not None for grad in found] == needs
    torch.testing.assert_close(found[which], gradients([True] * 6)[which], rtol=0, atol=0)


def test_segments_in_any_order_give_the_same():
    """The engine may cut and order segments as it likes; rows without a segment are of none."""
    f, ranks = factors(), RANKS
    cut = [[30, 3, 2, 0], [7, 4, 0, 3], [0, 3, 0, 0], [20, 0, 1, 0], [11, 1, 3, 0], [3, 4, -1, 0],
           [33, 2, 2, 3], [12, 6, 3, 1]]  # fmt: skip
    rows = 40
    x, base = random(rows, K), random(rows, N)
    dropouts, transform = drops(True), RoutedTransform("gelu", SCALES)
    found = []
    for order in (list(range(8)), [5, 2, 7, 0, 6, 1, 3, 4]):
        where = Segments(torch.tensor([cut[i] for i in order]), ranks)
        for backend in ("reference", "auto"):
            with pelt_fast.backend(backend):
                y = routed_update(x, base, *f.stacked(True), where, transform, *dropouts)
            leaves = [x, *f.leaves(True)]
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-11, atol=1e-11)
    free = [r for r in range(rows) if not any(a <= r < a + n for a, n, g, _ in cut if g >= 0)]
    assert torch.equal(found[0][0][free], base[free])


@pytest.mark.parametrize("wide", [torch.float32, None], ids=["fp32 factors", "own dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [False, True])
def test_errors_are_of_the_dtypes_own_size(dtype, wide, p):
    """At most twice the error of the same arithmetic in plain PyTorch, and a rounding."""
    torch.manual_seed(5)
    f, routes = factors(dtype=torch.float32), ROUTES["unsorted"]
    rows, dropouts = len(routes) * EACH, drops(p)
    where = segments_of(torch.tensor(routes), rows, RANKS)
    x, base, dy = (random(rows, w, dtype=dtype) for w in (K, N, N))
    f = Factors(*([t.detach().to(dtype) for t in each] for each in f))

    def run(activations, small, backend):
        f32 = Factors(*([t.detach().to(small).requires_grad_() for t in each] for each in f))
        a, b = (t.detach().to(activations).requires_grad_() for t in (x, base))
        with pelt_fast.backend(backend):
            y = routed_update(
                a, b, *f32.stacked(True), where, RoutedTransform("gelu", SCALES), *dropouts
            )
        grads = torch.autograd.grad(y, [a, b, *f32.leaves(True)], dy.to(activations))
        # each half at once: a single number may be what is left of large ones
        halves = (torch.cat([t.reshape(-1) for t in grads[2 + i :][: 2 * len(RANKS)]])
                  for i in (0, 2 * len(RANKS)))  # fmt: skip
        return [y, *grads[:2], *halves]

    small = dtype if wide is None else wide
    exact = run(torch.float64, torch.float64, "reference")
    for ours, plain, wanted in zip(
        run(dtype, small, "auto"), run(dtype, small, "reference"), exact, strict=True
    ):
        assert ours.dtype == plain.dtype and torch.isfinite(ours).all()
        errors = [(t.double() - wanted).norm() for t in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(dtype).eps * wanted.norm()
