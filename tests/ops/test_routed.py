"""Many methods in one batch: each row gets what its method gives it alone, and nothing else."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import pelt_fast
from benchmarks.common import saved_bytes
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
from pelt_fast.ops.routed.op import down_bwd, down_fwd, routed_update, up_bwd, up_fwd
from pelt_fast.ops.routed.segments import segments_of

CPU = torch.device("cpu")
K, N, EACH = 20, 12, 5
RANKS = [1, 3, 16, 100, 0]
SCALES = [2.0, -0.5, 1.0, 0.25, 3.0]
P = [0.3, 0.0, 0.5, 0.1, 0.2]
ROUTES = {
    "sorted": [0, 0, 1, 2, 2, 3],
    "unsorted": [3, 0, -1, 1, 0, 2, 4, 3, 0, 0],
    "none": [-1, -1, 4],
    "one": [2, 2, 2],
    "not all": [3, 0, 3],
    "no rows": [],
}
FLOAT, SEED, SEGMENT = 4, 16, 32  # bytes


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Uninitialised memory is NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Factors(NamedTuple):
    """Of each method: D, d, U, u."""

    downs: list[Tensor]
    down_biases: list[Tensor]
    ups: list[Tensor]
    up_biases: list[Tensor]

    def stacked(self, biases: bool) -> tuple[RoutedDown, RoutedUp]:
        down = RoutedDown(torch.cat(self.downs), torch.cat(self.down_biases) if biases else None)
        up = torch.cat([u.reshape(-1) for u in self.ups])
        return down, RoutedUp(up, torch.stack(self.up_biases) if biases else None)

    def leaves(self, biases: bool) -> list[Tensor]:
        lists = self if biases else (self.downs, self.ups)
        return [leaf for each in lists for leaf in each]


def factors(ranks=RANKS, dtype=torch.float64) -> Factors:
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).div_(max(shape[-1], 1) ** 0.5).requires_grad_()

    return Factors(
        [leaf(r, K) for r in ranks], [leaf(r) for r in ranks], [leaf(N, r) for r in ranks],
        [leaf(N) for _ in ranks],
    )  # fmt: skip


def random(*shape, dtype=torch.float64, needs=True):
    """A sliced view of a larger tensor: rows are strided."""
    wide = torch.randn(*shape[:-1], shape[-1] + 3, dtype=torch.float32)
    return wide.to(dtype)[..., : shape[-1]].detach().requires_grad_(needs)


def drops(p):
    """The dropouts of input and bottleneck, both or neither."""
    if not p:
        return [RoutedDropout([], None)] * 2
    return [RoutedDropout(P, draw_seed(CPU, len(P))) for _ in range(2)]


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
        return [y, *grads]

    small = dtype if wide is None else wide
    exact = run(torch.float64, torch.float64, "reference")
    for ours, plain, wanted in zip(
        run(dtype, small, "auto"), run(dtype, small, "reference"), exact, strict=True
    ):
        assert ours.dtype == plain.dtype and torch.isfinite(ours).all()
        errors = [(t.double() - wanted).norm() for t in (ours, plain)]
        assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(dtype).eps * wanted.norm()


def calls(p):
    """Each op with its arguments. Every row is routed and the ranks are equal: the results have no
    uninitialised memory."""
    ranks, rows = [3, 3], 4 * EACH
    where = segments_of(torch.tensor([1, 0, 0, 1]), rows, ranks)
    drop = ([0.1, 0.2], draw_seed(CPU, 2)) if p else ([], None)
    x, base, t = torch.randn(rows, K), torch.randn(rows, N), torch.randn(rows, 3)
    down, up = torch.randn(6, K), torch.randn(6 * N)
    for bias in (None, torch.randn(6)):
        yield down_fwd, (x, down, bias, *where, *drop)
    for passed in (None, torch.randn(rows, K)):
        for needs in ([True] * 3, [True, False, False], [False, True, False]):
            yield down_bwd, (t, x, passed, down, *where, *drop, needs)
    for activation in ("identity", "gelu"):
        transform = (activation, [2.0, 1.0])
        for bias in (None, torch.randn(2, N)):
            yield up_fwd, (base, t, up, bias, *where, *transform, *drop)
        for needs in ([True] * 3, [False, True, False]):
            yield up_bwd, (base, t, up, *where, *transform, *drop, needs)


def test_opcheck():
    for op, arguments in [*calls(True), *dict(calls(False)).items()]:
        opcheck(op.dispatched, arguments)


def test_ops_run_on_fake_cuda_tensors_without_a_gpu():
    for op, arguments in calls(True):
        expected = op(*arguments, backend="auto")
        with FakeTensorMode():
            made = [
                torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda")
                if isinstance(a, Tensor) else a
                for a in arguments
            ]  # fmt: skip
            outputs = op.dispatched(*made)
        several = isinstance(outputs, tuple)
        pairs = zip(outputs, expected, strict=True) if several else [(outputs, expected)]
        for output, real in pairs:
            assert output.device.type == "cuda"
            assert output.shape == real.shape and output.dtype == real.dtype


@pytest.mark.parametrize("p", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize(
    "needs, kept", [((True, True), (True, True)), ((True, False), (True, False)),
                    ((False, True), (False, True)), ((False, False), (False, False))],
)  # fmt: skip
def test_what_is_saved(needs, kept, activation, p):
    """x for D, T for U, or for dT past f; the stacked factors are the caller's own here."""
    f, routes = factors(dtype=torch.float32), torch.tensor([3, 0, 1, 2])
    rows = len(routes) * EACH
    where = segments_of(routes, rows, RANKS)
    down, up = f.stacked(True)
    down = RoutedDown(*(t.detach().requires_grad_(needs[0]) for t in down))
    up = RoutedUp(*(t.detach().requires_grad_(needs[1]) for t in up))
    x, base = (torch.randn(rows, w, requires_grad=True) for w in (K, N))
    dropouts = drops(p)
    known = [*down, *up, where.segments, *(d.seeds for d in dropouts if d.seeds is not None)]
    found = saved_bytes(
        lambda: routed_update(
            x, base, down, up, where, RoutedTransform(activation, SCALES), *dropouts
        ), known,
    )  # fmt: skip
    keeps_t = kept[1] or activation != "identity"
    assert found == rows * (kept[0] * K + keeps_t * max(RANKS)) * FLOAT


def test_the_public_function_saves_the_stacked_factors_and_nothing_wide():
    f, routes = factors(dtype=torch.float32), torch.tensor([3, 0, 1, 2])
    x, weight = torch.randn(4, EACH, K, requires_grad=True), torch.randn(N, K)
    found = saved_bytes(
        lambda: functional.routed_beside(
            x, lambda x: x @ weight.t(), routes, f.downs, f.ups, scales=SCALES, input_dropout_p=0.1
        ), [weight],
    )  # fmt: skip
    stacked = sum(RANKS) * (K + N)
    floats = 4 * EACH * (K + max(RANKS)) + stacked
    assert found == floats * FLOAT + len(RANKS) * SEED + 4 * SEGMENT


def test_no_gradient_saves_nothing():
    f, x = factors(dtype=torch.float32), torch.randn(2, K)
    with torch.no_grad():
        y = functional.routed_beside(
            x, torch.zeros(2, N), torch.tensor([0, 3]), f.downs, f.ups, scales=SCALES
        )
    assert y.grad_fn is None


def test_the_layers_output_is_never_written_to():
    f, base = factors(), torch.randn(3, N).double()
    before = base.clone()
    x = torch.randn(3, K).double()
    functional.routed_beside(x, base, torch.tensor([0, -1, 1]), f.downs, f.ups, scales=SCALES)
    assert torch.equal(base, before)


def test_methods_may_lack_factors_and_biases():
    f, x = factors(), torch.randn(4, K).double()
    routes, base = torch.tensor([0, 1, 2, 3]), torch.randn(4, N).double()
    downs, ups = [f.downs[0], None, f.downs[2], f.downs[3]], [f.ups[0], None, *f.ups[2:4]]
    biases = dict(down_biases=[f.down_biases[0], None, None, None],
                  up_biases=[None, None, f.up_biases[2], None])  # fmt: skip
    y = functional.routed_beside(
        x, base, routes, downs, ups, scales=SCALES[:4], activation="tanh", **biases
    )
    for i in range(4):
        wanted = base[i]
        if downs[i] is not None:
            wanted = functional.parallel_adapter(
                base[i : i + 1], x[i : i + 1], downs[i], biases["down_biases"][i], ups[i],
                biases["up_biases"][i], activation="tanh", scale=SCALES[i],
            )[0]  # fmt: skip
        torch.testing.assert_close(y[i], wanted)
    y.sum().backward()
    assert f.up_biases[2].grad is not None and f.up_biases[0].grad is None
    none = functional.routed_beside(x, base, routes, [None] * 4, [None] * 4, scales=[1.0] * 4)
    assert torch.equal(none, base)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_masks_again(reentrant):
    f, weight = factors(dtype=torch.float32), torch.randn(N, K)
    x, routes = torch.randn(4, K, requires_grad=True), torch.tensor([2, 3, -1, 2])

    def step(x):
        return functional.routed_beside(
            x, lambda x: x @ weight.t(), routes, f.downs, f.ups, scales=SCALES, input_dropout_p=P,
            dropout_p=0.2,
        )  # fmt: skip

    found = []
    for run in (step, lambda x: checkpoint(step, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x.grad = f.downs[2].grad = None
        run(x).square().sum().backward()
        found.append((x.grad.clone(), f.downs[2].grad.clone()))
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)


def test_it_compiles_whole_and_equals_eager():
    torch._dynamo.reset()
    f, weight, routes = factors(dtype=torch.float32), torch.randn(N, K), torch.tensor([3, 0, -1, 0])

    def step(x, routes):
        return functional.routed_beside(
            x, lambda x: x @ weight.t(), routes, f.downs, f.ups, scales=SCALES, activation="tanh",
            down_biases=f.down_biases, up_biases=f.up_biases,
        )  # fmt: skip

    found = []
    used = [leaf for leaf in f.leaves(True) if leaf.numel()]
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = torch.linspace(-1, 1, 4 * EACH * K).view(4, EACH, K).requires_grad_()
        found.append(torch.autograd.grad(run(x, routes).sum(), (x, *used)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_segments_of_a_batch():
    routes = torch.tensor([1, 1, 0, -1, 2, 1, 0])
    where = segments_of(routes, 14, [4, 4, 0])
    assert where.segments.tolist() == [[4, 2, 0, 0], [12, 2, 0, 2], [0, 4, 1, 0], [10, 2, 1, 4]]
    assert where.ranks == [4, 4, 0]
    assert segments_of(routes[:0], 0, [4]).segments.shape == (0, 4)


def test_segments_on_a_device_are_found_without_a_look_at_it():
    """As many as routes; rows of none are named so."""
    routes = torch.tensor([1, 1, 0, -1, 2, 1, 0])
    where = torch.compile(segments_of, fullgraph=True, backend="eager")(routes, 14, [4, 4, 0])
    assert sorted(where.segments.tolist()) == [
        [0, 2, 1, 0], [2, 2, 1, 2], [4, 2, 0, 0], [6, 2, -1, 0], [8, 2, 2, 0], [10, 2, 1, 4],
        [12, 2, 0, 2],
    ]  # fmt: skip


def call(**changes):
    arguments = dict(
        x=torch.randn(4, K), layer=torch.randn(4, N), routes=torch.tensor([0, 1]),
        down_weights=[torch.randn(2, K), torch.randn(3, K)],
        up_weights=[torch.randn(N, 2), torch.randn(N, 3)], scales=[1.0, 2.0],
    )  # fmt: skip
    return functional.routed_beside(**(arguments | changes))


TWO = [torch.randn(2), torch.randn(3)]
BAD = [
    (dict(x=[1.0]), TypeError, "x must be a tensor, got list"),
    (dict(x=torch.randn(K)), ValueError, "x must have at least 2 dims"),
    (dict(routes=[0, 1]), TypeError, "routes must be a tensor, got list"),
    (dict(routes=torch.tensor([0.0])), TypeError, r"routes must be torch\.int64, got torch\.float32"),
    (dict(routes=torch.tensor([[0]])), ValueError, r"routes must have shape \(B\), got \(1, 1\)"),
    (dict(routes=torch.tensor([0, 1, 0])), ValueError, "routes must have a length that divides"),
    (dict(routes=torch.tensor([0, 2])), ValueError, "routes must be -1 to 1, .* got 2"),
    (dict(routes=torch.tensor([-2, 0])), ValueError, "routes must be -1 to 1, .* got -2"),
    (dict(down_weights=TWO[:1]), ValueError, "down_weights must have 2 items as scales has, got 1"),
    (dict(up_biases=TWO[:1]), ValueError, "up_biases must have 2 items as scales has, got 1"),
    (dict(up_weights=[None, TWO[0]]), TypeError, r"up_weights\[0\] must be a tensor, got NoneType"),
    (dict(down_weights=[torch.randn(2, K + 1), None]), ValueError, r"down_weights\[0\] must have shape"),
    (dict(up_weights=[torch.randn(N, 2), torch.randn(N + 1, 3)]), ValueError,
     r"up_weights\[1\] must have shape \(12, 3\), got \(13, 3\)"),
    (dict(down_biases=[torch.randn(3), None]), ValueError, r"down_biases\[0\] must have shape \(2\)"),
    (dict(down_biases=[torch.randn(2).double(), None]), TypeError, r"down_biases\[0\] must be"),
    (dict(scales=[1.0, float("nan")]), ValueError, "scale must be a finite number, got nan"),
    (dict(activation="swish"), ValueError, "activation must be one of"),
    (dict(dropout_p=[0.1]), ValueError, "dropout_p must be a number or .* scales, 2, got 1"),
    (dict(input_dropout_p=1.0), ValueError, r"input_dropout_p must be in \[0, 1\), got 1.0"),
    (dict(layer=3), TypeError, "layer must be a function or a module, got int"),
    (dict(layer=torch.randn(4, N + 1)), ValueError, r"layer must have shape \(4, 12\), got \(4, 13\)"),
    (dict(layer=lambda x: x), ValueError, r"the output of layer must have shape \(4, 12\)"),
    (dict(layer=torch.randn(4, N).double()), TypeError, r"up_weights\[0\] must be torch\.float64 or"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD, ids=lambda value: str(value)[:30])
def test_a_wrong_argument_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
