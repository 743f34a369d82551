"""The C++ ops with a small rank and of a prefix: against fp64 on every instruction set, the same
bits on any number of threads, odd sizes, and refusals that name the argument.

Errors are in units of the result's own rounding and of its fp32 sums.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pelt_fast.ops.common import activations, native
from pelt_fast.ops.common.dropout import draw_seed, keep_mask, keep_scale, threshold
from tests.ops.exactly import DTYPES, close, padded, prefix_reference

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
SIZES = [  # M, K, R
    (1, 1, 1), (1, 300, 16), (7, 13, 3), (37, 52, 5), (64, 128, 16), (131, 257, 17),
    (600, 96, 33), (1031, 136, 64), (65, 1030, 100), (70, 129, 128),
]  # fmt: skip
P = 0.3


def mask(rows: int, columns: int, seed: Tensor | None) -> tuple[Tensor, tuple]:
    """The factor in fp64, and the ops' arguments."""
    if seed is None:
        return torch.ones(rows, columns).double(), (None, 0, 1.0)
    keep = keep_mask(0, rows * columns, P, seed).view(rows, columns)
    return keep.double() * keep_scale(P), (seed, threshold(P), keep_scale(P))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, r", SIZES)
def test_rank_down(m, k, r, dtype, masked):
    x, a, bias = padded(m, k, dtype=dtype), torch.randn(k, r).t(), torch.randn(r)
    factor, drawn = mask(m, k, draw_seed(x.device)[0] if masked else None)
    dropped = factor * x.double()
    s = native.ops().rank_down_(x.new_empty(m, r), x, a, bias, *drawn)
    close(s, dropped @ a.double().t() + bias.double(), k)
    base, dx, da = padded(m, k, dtype=dtype), x.new_empty(m, k), torch.empty(r, k)
    native.ops().rank_down_backward_(s, x, a, base, dx, da, *drawn)
    wanted = base.double() + factor * (s.double() @ a.double())
    close(dx, wanted, r)
    close(da, s.double().t() @ dropped, m)
    native.ops().rank_down_backward_(s, None, a, base, base, None, *drawn)  # in place
    assert torch.equal(base, dx)
    native.ops().rank_down_backward_(s, None, a, None, dx, None, *drawn)
    close(dx, factor * (s.double() @ a.double()), r)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, r", SIZES)
def test_rank_up(m, n, r, dtype, masked):
    base, h = padded(m, n, dtype=dtype), padded(m, r, dtype=dtype)
    b, bias = torch.randn(r, n).t(), torch.randn(n)
    factor, drawn = mask(m, n, draw_seed(base.device)[0] if masked else None)
    out = native.ops().rank_up_(base.new_empty(m, n), base, h, b, bias, 1.5, *drawn)
    update = 1.5 * (h.double() @ b.double().t() + bias.double())
    close(out, factor * base.double() + update, r)
    if not masked:
        alone = native.ops().rank_up_(base.new_empty(m, n), None, h, b, bias, 1.5, *drawn)
        close(alone, update, r)
    in_place = base.clone()
    native.ops().rank_up_(in_place, in_place, h, b, bias, 1.5, *drawn)
    assert torch.equal(in_place, out)
    dy, dh = padded(m, n, dtype=dtype), h.new_empty(m, r)
    db, d_bias = torch.empty(n, r), torch.empty(n)
    native.ops().rank_up_backward_(dy, h, b, 1.5, dh, db, d_bias)
    close(dh, 1.5 * dy.double() @ b.double(), n)
    close(db, 1.5 * dy.double().t() @ h.double(), m)
    close(d_bias, 1.5 * dy.double().sum(0), m)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", activations.ACTIVATIONS)
@pytest.mark.parametrize("m, n", [(1, 1), (7, 13), (37, 128), (131, 257), (20, 3000)])
def test_activation(m, n, name, dtype, gated, masked):
    t, d = (3 * padded(m, n, dtype=dtype) for _ in range(2))
    z = padded(m, n, dtype=dtype) if gated else None
    factor, drawn = mask(m, n, draw_seed(t.device)[0] if masked else None)
    number, beside = activations.ACTIVATIONS.index(name), 1.0 if z is None else z.double()
    value, slope = (f(name, t.double()) for f in (activations.activate, activations.derivative))
    plain = [f(name, t) for f in (activations.activate, activations.derivative)]

    def as_plain(found: Tensor, exact: Tensor, its: Tensor, beside, size: Tensor) -> None:
        """Twice the error of the plain expression, and roundings: of the result, and of an fp32
        number of its ``size`` (near a zero of f' it is a difference of ones)."""
        wanted = exact * beside
        budget = 2 * ((its.double() - exact) * beside).norm() + 6e-8 * (size * beside).norm()
        assert (found.double() - wanted).norm() <= budget + torch.finfo(dtype).eps * wanted.norm()

    out = native.ops().activate_(t.new_empty(m, n), t, z, number, *drawn)
    as_plain(out, value, plain[0], factor * beside, t.double())
    over = t.clone() if z is None else z.clone()  # in place
    given = (over, None) if z is None else (t, over)
    native.ops().activate_(over, *given, number, *drawn)
    assert torch.equal(over, out)
    dt = None if z is None else torch.empty_like(out)
    found = native.ops().activate_backward_(d.clone(), t, z, dt, number, *drawn)
    by_t = found if z is None else dt
    as_plain(by_t, slope, plain[1], factor * d.double() * beside, 2 * torch.ones_like(slope))
    if z is not None:
        as_plain(found, value, plain[0], factor * d.double(), t.double())


def test_activations_keep_what_is_not_a_number():
    t = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 200.0, -200.0]])
    for number, name in enumerate(activations.ACTIVATIONS):
        found = native.ops().activate_(torch.empty_like(t), t, None, number, None, 0, 1.0)
        torch.testing.assert_close(found, activations.activate(name, t), equal_nan=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("m, k, n, r", [
    (1, 1, 1, 1), (7, 13, 20, 3), (64, 128, 128, 16), (131, 257, 96, 17), (1031, 136, 130, 100),
])  # fmt: skip
def test_adapter(m, k, n, r, name, dtype, masked):
    """The products of the backward are judged from the t that the forward kept."""
    x, base, dy = (padded(m, width, dtype=dtype) for width in (k, n, n))
    down, up = torch.randn(k, r).t() / k**0.5, torch.randn(r, n).t() / r**0.5
    down_bias, up_bias = torch.randn(r), torch.randn(n)
    factor, drawn = mask(m, r, draw_seed(x.device)[0] if masked else None)
    number = activations.ACTIVATIONS.index(name)

    def forward(y, t, base):
        weights = (down, down_bias, up, up_bias)
        return native.ops().adapter_(y, t, x, base, *weights, 1.5, number, *drawn)

    t = x.new_empty(m, r)
    y = forward(base.new_empty(m, n), t, base)
    exact = x.double() @ down.double().t() + down_bias.double()
    close(t, exact, k)
    h = factor * activations.activate(name, exact)
    close(y, base.double() + 1.5 * (h @ up.double().t() + up_bias.double()), k + r)
    assert torch.equal(forward(torch.empty_like(y), None, base), y)
    over = base.clone()
    assert torch.equal(forward(over, None, over), y)  # in place

    kept = t.double()
    h = factor * activations.activate(name, kept)
    dt = 1.5 * (dy.double() @ up.double()) * factor * activations.derivative(name, kept)
    wanted = {"d_down": dt.t() @ x.double(), "d_down_bias": dt.sum(0),
              "d_up": 1.5 * dy.double().t() @ h, "d_up_bias": 1.5 * dy.double().sum(0)}  # fmt: skip
    residual = padded(m, k, dtype=dtype)

    def backward(dx, residual, names):
        found = {
            each: torch.empty(wanted[each].shape) if each in names else None for each in wanted
        }
        native.ops().adapter_backward_(
            dy, x, t, down, up, residual, dx, *found.values(), 1.5, number, *drawn
        )
        return found

    dx = x.new_empty(m, k)
    everything = backward(dx, residual, wanted)
    close(dx, residual.double() + dt @ down.double(), n + r)
    for each, exactly in wanted.items():
        close(everything[each], exactly, m + n)
        assert torch.equal(backward(None, None, [each])[each], everything[each])
    alone = x.new_empty(m, k)
    backward(alone, None, [])
    close(alone, dt @ down.double(), n + r)


PREFIXES = [  # B, H, G, T, D, P
    (1, 1, 1, 1, 1, 1), (2, 4, 2, 13, 8, 5), (3, 2, 1, 67, 64, 30), (1, 3, 3, 130, 17, 200),
    (2, 2, 2, 64, 128, 256), (2, 4, 2, 1, 64, 30), (1, 2, 1, 8, 16, 7), (3, 2, 2, 2, 128, 200),
]  # fmt: skip


@pytest.mark.parametrize("form", ["gated", "softmax", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b, h, g, t, d, p", PREFIXES)
def test_prefix(b, h, g, t, d, p, dtype, form):
    relu, gated = form == "relu", form == "gated"
    q, o, do = (torch.randn(b, t, h, d).to(dtype).transpose(1, 2) for _ in range(3))
    lse, k, v = torch.randn(b, h, t), torch.randn(g, p, d), torch.randn(g, p, d)
    if t > 1:
        lse[0, 0, 0], o[0, 0, 0] = -torch.inf, 0  # a row that sees no key
    scale = d**-0.5
    exact = [x.double().detach().requires_grad_() for x in (q, k, v)]
    fixed = o.double(), lse.double()
    wanted, joint = prefix_reference(exact[0], *fixed, *exact[1:], scale, relu, gated)
    found, found_lse = o.clone(), lse.clone()
    native.ops().prefix_merge_(found, found_lse, q, k, v, scale, relu, gated)
    close(found, wanted.detach(), d + p)
    if gated:
        close(found_lse, joint.detach(), d + p)
    else:
        assert torch.equal(found_lse, lse)

    # what the backward adds is the gradient with the context's own output and lse held fixed
    by_prefix = torch.autograd.grad(wanted, exact, do.double())
    dq, dk, dv = torch.zeros_like(q), torch.empty(h, p, d), torch.empty(h, p, d)
    given = (do, q, k, v, found, found_lse, scale, relu, gated)
    native.ops().prefix_backward_(dq, dk, dv, *given)
    # rounding of the outputs it reads, in their dtype
    terms = (d + p) * (1 + (torch.finfo(dtype).eps / 4e-8) ** 2)
    close(dq.double(), by_prefix[0], terms)
    for mine, its in ((dk, by_prefix[1]), (dv, by_prefix[2])):
        close(mine.view(g, h // g, p, d).sum(1).double(), its, terms * b * t)
    again = [torch.empty_like(dk), torch.empty_like(dv)]
    native.ops().prefix_backward_(None, *again, *given)
    assert torch.equal(again[0], dk) and torch.equal(again[1], dv)


def results() -> list[Tensor]:
    """Every op once, on shapes with several parts."""
    torch.manual_seed(0)
    x, a, seed = torch.randn(1500, 136), torch.randn(16, 136), draw_seed(torch.device("cpu"))[0]
    s, dx, da = x.new_empty(1500, 16), torch.empty_like(x), torch.empty_like(a)
    drawn = (seed, threshold(P), keep_scale(P))
    native.ops().rank_down_(s, x, a, None, *drawn)
    native.ops().rank_down_backward_(s, x, a, x, dx, da, *drawn)
    b, dh = torch.randn(136, 16), torch.empty_like(s)
    db, d_bias, y = torch.empty_like(b), torch.empty(136), torch.empty_like(x)
    native.ops().rank_up_(y, x, s, b, None, 2.0, *drawn)
    native.ops().rank_up_backward_(x, s, b, 2.0, dh, db, d_bias)
    act, d_act = torch.empty_like(x), x.clone()
    native.ops().activate_(act, x, y, 4, *drawn)
    native.ops().activate_backward_(d_act, x, None, None, 2, *drawn)
    down, up, t = torch.randn(16, 136), torch.randn(136, 16), torch.empty_like(s)
    whole, d_x = torch.empty_like(x), torch.empty_like(x)
    native.ops().adapter_(whole, t, x, x, down, None, up, None, 1.0, 1, *drawn)
    four = [torch.empty_like(down), torch.empty(16), torch.empty_like(up), torch.empty(136)]
    native.ops().adapter_backward_(x, x, t, down, up, x, d_x, *four, 1.0, 1, *drawn)
    q, o, lse = torch.randn(2, 4, 300, 16), torch.randn(2, 4, 300, 16), torch.randn(2, 4, 300)
    k, v, dq = torch.randn(4, 6, 16), torch.randn(4, 6, 16), torch.zeros(2, 4, 300, 16)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    native.ops().prefix_merge_(o, lse, q, k, v, 0.25, False, True)
    native.ops().prefix_backward_(dq, dk, dv, o, q, k, v, o, lse, 0.25, False, True)
    step, step_lse = torch.empty(2, 4, 3, 16), torch.empty(2, 4, 3)
    native.ops().prefix_few_queries_(step, step_lse, q[:, :, :3], q, o, k, v, 0.25)
    products = x.new_empty(2, 5, 1500)
    native.ops().few_rows_product_(products[0], down[:5], x.t(), None)
    native.ops().few_rows_product_(products[1], down[:5], x.t().contiguous(), None)
    return [s, dx, da, y, dh, db, d_bias, act, d_act, whole, t, d_x, *four, o, lse, dq, dk, dv,
            step, step_lse, products]  # fmt: skip


def test_the_same_bits_on_any_number_of_threads():
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


class Worked(torch.utils.data.Dataset):
    """Runs the ops where a DataLoader runs it; says how many threads came of it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        before = len(os.listdir("/proc/self/task"))
        found = results()
        return len(os.listdir("/proc/self/task")) - before, found[2]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_a_dataloaders_worker_gets_no_threads_of_ours():
    expected = results()[2]
    for started, found in torch.utils.data.DataLoader(Worked(), batch_size=None, num_workers=1):
        assert started == 0 and torch.equal(found, expected)


def test_no_rows_are_no_work():
    x, a, da = torch.empty(0, 8), torch.randn(3, 8), torch.full((3, 8), torch.nan)
    native.ops().rank_down_(torch.empty(0, 3), x, a, None, None, 0, 1.0)
    native.ops().rank_down_backward_(
        torch.empty(0, 3), x, a, None, torch.empty(0, 8), da, None, 0, 1.0
    )
    assert torch.equal(da, torch.zeros(3, 8))


@pytest.mark.parametrize("call, said", [
    (lambda o: o.rank_down_(torch.empty(4, 3), torch.randn(4, 8), torch.randn(3, 9), None, None, 0,
                            1.0), r"a must have shape \(3, 8\), got \(3, 9\)"),
    (lambda o: o.rank_down_(torch.empty(4, 3), torch.randn(4, 8).double(), torch.randn(3, 8), None,
                            None, 0, 1.0), "x must be float32, bfloat16 or float16"),
    (lambda o: o.rank_down_(torch.empty(4, 3), torch.randn(8, 4).t(), torch.randn(3, 8), None, None,
                            0, 1.0), "x must have contiguous rows, got a stride of 4"),
    (lambda o: o.rank_down_(torch.empty(4, 200), torch.randn(4, 8), torch.randn(200, 8), None, None,
                            0, 1.0), "the rank must be 1 to 128, got 200"),
    (lambda o: o.rank_down_(torch.empty(4, 3), torch.randn(4, 8), torch.randn(3, 8).bfloat16(),
                            None, None, 0, 1.0), "a must be float32 on the CPU"),
    (lambda o: o.rank_down_(torch.empty(4, 3), torch.randn(4, 8), torch.randn(3, 8), None,
                            torch.zeros(2), 0, 1.0), "seed must be int64"),
    (lambda o: o.rank_down_(torch.empty(4, 3), torch.randn(4, 8), torch.randn(3, 8), None,
                            torch.zeros(2, dtype=torch.int64), 70000, 1.0), "threshold must be in"),
    (lambda o: o.rank_down_backward_(torch.randn(4, 3), None, None, None, None, None, None, 0, 1.0),
     "dx or da must be given"),
    (lambda o: o.rank_up_(torch.empty(4, 8), None, torch.randn(4, 3), torch.randn(8, 3),
                          torch.randn(7), 1.0, None, 0, 1.0), r"bias must have shape \(8\)"),
    (lambda o: o.rank_up_backward_(torch.randn(4, 8), torch.randn(5, 3), None, 1.0, None,
                                   torch.empty(8, 3), None), r"h must have shape \(4, 3\)"),
    (lambda o: o.adapter_(torch.empty(4, 8), None, torch.randn(4, 8), torch.randn(4, 8),
                          torch.randn(3, 8), None, torch.randn(8, 4), None, 1.0, 1, None, 0, 1.0),
     r"up must have shape \(8, 3\), got \(8, 4\)"),
    (lambda o: o.adapter_backward_(torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 3),
                                   torch.randn(3, 8), torch.randn(8, 3), None, None,
                                   torch.empty(8, 3).t(), None, None, None, 1.0, 1, None, 0, 1.0),
     "d_down must be contiguous"),
    (lambda o: o.activate_(torch.empty(4, 3), torch.randn(4, 8), None, 1, None, 0, 1.0),
     r"out must have shape \(4, 8\), got \(4, 3\)"),
    (lambda o: o.activate_(torch.empty(4, 8), torch.randn(4, 8), None, 6, None, 0, 1.0),
     "activation must be 0 to 5, got 6"),
    (lambda o: o.activate_backward_(torch.empty(4, 8), torch.randn(4, 8), torch.randn(4, 8), None,
                                    1, None, 0, 1.0), "z and dt must come together"),
    (lambda o: o.prefix_merge_(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3),
                               torch.randn(1, 2, 3, 8), torch.randn(2, 300, 8),
                               torch.randn(2, 300, 8), 1.0, False, True), "with P at most 256"),
    (lambda o: o.prefix_merge_(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 4),
                               torch.randn(1, 2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8),
                               1.0, False, True), r"lse must be float32 \(1, 2, 3\)"),
])  # fmt: skip
def test_bad_arguments_are_named(call, said):
    with pytest.raises(RuntimeError, match=said):
        call(native.ops())


LEVELS = ("portable", "avx2", "avx512")


@pytest.mark.skipif("PELT_FAST_ISA" in os.environ, reason="this is the run it starts")
@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level):
    best = native.facts()["instruction set"]
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip("what the other tests run" if level == best else f"this machine has {best}")
    others = ("test_native_attention.py", "test_native_few.py", "test_native.py")
    files = [__file__, *(os.path.join(os.path.dirname(__file__), name) for name in others)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    run = subprocess.run(
        command, env={**os.environ, "PELT_FAST_ISA": level}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_an_instruction_set_that_is_not_here_is_refused():
    code = "from pelt_fast.ops.common import native; native.facts()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env={**os.environ, "PELT_FAST_ISA": "sse9"})  # fmt: skip
    assert run.returncode != 0 and "PELT_FAST_ISA must be portable, avx2 or avx512" in run.stderr
