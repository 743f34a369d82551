"""The grouped ops and their public function: schemas, what is saved, segments, errors."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from benchmarks.common import saved_bytes
from pelt_fast import functional
from pelt_fast.ops.common.bundles import RoutedDown, RoutedTransform, RoutedUp
from pelt_fast.ops.common.dropout import draw_seed
from pelt_fast.ops.routed.op import down_bwd, down_fwd, routed_update, up_bwd, up_fwd
from pelt_fast.ops.routed.segments import segments_of
from tests.ops.routed import CPU, EACH, RANKS, SCALES, K, N, P, drops, factors

FLOAT, SEED, SEGMENT = 4, 16, 32  # bytes


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


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_detection_finds_nothing_in_what_is_not_written():
    f, x = factors(dtype=torch.float32), torch.randn(3, K, requires_grad=True)
    routes = torch.tensor([0, -1, 3])
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        with torch.autograd.detect_anomaly():
            y = functional.routed_beside(
                x, torch.zeros(3, N), routes, f.downs, f.ups, scales=SCALES
            )
            y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(x.grad).all()


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
    (dict(scales=[1.0, float("nan")]), ValueError, r"scales\[1\] must be a finite number, got nan"),
    (dict(scales=[torch.ones(()), 1.0]), ValueError, r"scales\[0\] must be a finite number, got tens"),
    (dict(activation="swish"), ValueError, "activation must be one of"),
    (dict(dropout_p=[0.1]), ValueError, "dropout_p must be a number or .* scales, 2, got 1"),
    (dict(input_dropout_p=1.0), ValueError, r"input_dropout_p must be in \[0, 1\), got 1.0"),
    (dict(layer=3), TypeError, "layer must be a function or a module, got int"),
    (dict(layer=torch.randn(4, N + 1)), ValueError, r"layer must have shape \(4, 12\), got \(4, 13\)"),
    (dict(layer=lambda x: x), ValueError, r"the output of layer must have shape \(4, 12\)"),
    (dict(layer=torch.randn(4, N).double()), TypeError, r"up_weights\[0\] must be torch\.float64 or"),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD, ids=[message for *_, message in BAD])
def test_a_wrong_argument_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
