"""One batch, many prefixes: every method's rows are those of the method alone."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from benchmarks.common import saved_bytes
from pelt_fast import functional
from pelt_fast.ops.common import native
from pelt_fast.ops.common.backends import backend
from pelt_fast.ops.common.bundles import QKV, Form, RoutedPrefix, Scores
from pelt_fast.ops.common.dropout import draw_seed
from pelt_fast.ops.prefix_attention.op import RoutedPrefixFunction, attention_with_routed_prefix

needs_cpp = pytest.mark.skipif(native.why_missing() is not None, reason="no C++")
FORMS = [("softmax", "gated"), ("softmax", "add"), ("relu", "add")]
B, H, G, T, S, D = 8, 4, 2, 11, 13, 16
LENGTHS = (1, 3, 16, 30, 200, 0, 5)  # the sixth has no prefix here, the last has no rows
ROUTES = (3, -1, 0, 4, 2, 1, 5, 3)


def context(dtype=torch.float32, queries=T, heads=(H, G), batch=B):
    def make(length, heads):
        rows = torch.randn(batch, length, heads, D).to(dtype)
        return rows.transpose(1, 2).requires_grad_()

    return [make(queries, heads[0]), make(S, heads[1]), make(S, heads[1])]


def prefixes(dtype=torch.float32, lengths=LENGTHS, heads=G):
    return [
        [torch.randn(heads, length, D).to(dtype).requires_grad_() for length in lengths]
        for _ in range(2)
    ]


def mask_of(kind: str, queries=T) -> dict:
    if kind in ("none", "causal"):
        return dict(is_causal=kind == "causal")
    mask = torch.rand(B, 1, queries, S) > 0.3
    mask[:, :, queries // 2] = False  # a query that sees no key
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    return dict(attn_mask=mask)


def routed(qkv, own, routes=ROUTES, **settings) -> Tensor:
    return functional.routed_prefix_attention(*qkv, torch.tensor(routes), *own, **settings)


def rows_alone(qkv, own, method: int, rows: list[int], settings: dict) -> Tensor:
    """These rows by themselves, with the prefix of their method, or with none."""
    settings, mask = dict(settings), settings.get("attn_mask")
    if mask is not None:
        settings["attn_mask"] = mask[rows]
    part = [t[rows].transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]
    if method >= 0 and own[0][method].shape[1]:
        return functional.prefix_attention(*part, own[0][method], own[1][method], **settings)
    q, k, v = part
    plain = {key: settings[key] for key in ("attn_mask", "is_causal") if key in settings}
    if mask is not None and mask.dtype != torch.bool:
        plain["attn_mask"] = plain["attn_mask"].to(q.dtype)
    if plain.get("is_causal"):  # bottom right
        plain = dict(attn_mask=torch.ones(q.shape[2], S, dtype=torch.bool).tril(S - q.shape[2]))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **plain)


def by_method() -> list[tuple[int, list[int]]]:
    return [(m, [b for b in range(B) if ROUTES[b] == m]) for m in sorted(set(ROUTES))]


def leaves(qkv, own) -> list[Tensor]:
    return [*qkv, *own[0], *own[1]]


def gradients(out: Tensor, do: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(out, wanted, do, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads)]


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
@pytest.mark.parametrize("form, composition", FORMS)
@pytest.mark.parametrize("name", ["reference", "auto"])
def test_every_method_is_what_it_is_alone(name, form, composition, kind):
    qkv, own, do = context(torch.float64), prefixes(torch.float64), torch.randn(B, H, T, D).double()
    settings = mask_of(kind) | dict(form=form, composition=composition)
    with backend(name):
        out = routed(qkv, own, **settings)
        found = gradients(out, do, leaves(qkv, own))
        wanted = [torch.zeros_like(t) for t in leaves(qkv, own)]
        for method, rows in by_method():
            alone = rows_alone(qkv, own, method, rows, settings)
            torch.testing.assert_close(out[rows], alone, rtol=0, atol=1e-13)
            for total, part in zip(wanted, gradients(alone, do[rows], leaves(qkv, own))):
                total += part
    for mine, its in zip(found, wanted):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "causal"])
@pytest.mark.parametrize("form, composition", FORMS)
@pytest.mark.parametrize("queries", [T, 70, 3, 1])
def test_a_row_has_the_bits_of_its_method_alone(queries, form, composition, kind, dtype):
    qkv, own = context(dtype, queries), prefixes()
    settings = mask_of(kind, queries) | dict(form=form, composition=composition)
    out, do = routed(qkv, own, **settings), torch.randn(B, H, queries, D).to(dtype)
    found = gradients(out, do, leaves(qkv, own))
    for method, rows in by_method():
        alone = rows_alone(qkv, own, method, rows, settings)
        assert torch.equal(out[rows], alone), method
        grads = gradients(alone, do[rows], leaves(qkv, own))
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(found[:3], grads)), method
        for side in (3, 3 + len(LENGTHS)) if method >= 0 else ():
            assert torch.equal(found[side + method], grads[side + method]), method
    with torch.no_grad():
        assert torch.equal(routed(qkv, own, **settings), out)


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("form, composition", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_backward_matches_finite_differences(form, composition, p):
    lengths, routes = [2, 0, 1, 3], torch.tensor([2, -1, 0, 2, 1])
    shapes = [(5, 2, 3, 2), (5, 1, 4, 2), (5, 1, 4, 2), (1, 6, 2), (1, 6, 2)]
    tensors = [torch.randn(shape).double().requires_grad_() for shape in shapes]
    seed = draw_seed(torch.device("cpu"), 2) if p else None
    mask = torch.rand(5, 1, 3, 4) > 0.3
    mask[:3, :, 1] = False
    settings = (routes, lengths, mask, False, 0.7, form, composition, p, seed)
    for name in ("reference", "auto"):
        with backend(name):
            assert gradcheck(
                lambda *t: RoutedPrefixFunction.apply(*t, *settings), tensors, atol=1e-6
            )


@pytest.mark.parametrize("which", range(5))
def test_backward_gives_what_is_needed(which):
    qkv, own = context(), prefixes()
    small = [torch.cat(side, 1).detach() for side in own]
    tensors = [t.detach().requires_grad_(i == which) for i, t in enumerate([*qkv, *small])]
    prefix = RoutedPrefix(*tensors[3:], torch.tensor(ROUTES), list(LENGTHS))
    scores, form = Scores(None, False, 0.25), Form("softmax", "gated")
    out = attention_with_routed_prefix(QKV(*tensors[:3]), prefix, scores, form, 0.0, True)
    out.sum().backward()
    assert [t.grad is not None for t in tensors] == [i == which for i in range(5)]


def test_one_method_of_all_rows_is_prefix_attention_with_its_dropout():
    qkv, own = context(), prefixes(lengths=(5,))
    for p in (0.0, 0.3):
        torch.manual_seed(5)
        found = routed(qkv, own, [0] * B, dropout_p=p)
        torch.manual_seed(5)
        wanted = functional.prefix_attention(*qkv, own[0][0], own[1][0], dropout_p=p)
        assert torch.equal(found, wanted)
        pairs = [gradients(out, torch.ones_like(out), leaves(qkv, own)) for out in (found, wanted)]
        assert all(map(torch.equal, *pairs))


def test_dropout_draws_for_the_whole_batch(monkeypatch):
    """The same masks in blocks of the batch, by the reference, and in any order of the methods."""
    from pelt_fast.ops.common import dropout

    qkv, own = context(torch.float64), prefixes(torch.float64)
    order = [3, 1, 0, 2, 6, 5, 4]  # the same methods under other numbers
    turned = [[side[old] for old in order] for side in own]
    routes = [-1 if r < 0 else order.index(r) for r in ROUTES]
    found = []
    for name, size, given in (
        ("reference", 1 << 20, (own, ROUTES)), ("auto", 1 << 20, (own, ROUTES)),
        ("auto", 1, (own, ROUTES)), ("auto", 1 << 20, (turned, routes)),
    ):  # fmt: skip
        monkeypatch.setitem(dropout.BLOCK_ELEMENTS, "cpu", size)
        torch.manual_seed(7)
        with backend(name):
            out = routed(qkv, *given, dropout_p=0.4)
        found.append([out, *gradients(out, torch.ones_like(out), leaves(qkv, own))])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize("queries", [T, 1])
def test_a_batch_of_none_is_attention_without_a_prefix(name, queries):
    qkv, own = context(queries=queries), prefixes()
    with backend(name):
        out = routed(qkv, own, [-1] * B)
    wanted = F.scaled_dot_product_attention(*qkv, enable_gqa=True)
    if name == "auto":
        assert torch.equal(out, wanted)
    torch.testing.assert_close(out, wanted)
    grads = torch.autograd.grad(out.sum(), leaves(qkv, own))
    torch.testing.assert_close(grads[:3], torch.autograd.grad(wanted.sum(), qkv))
    assert not any(grad.any() for grad in grads[3:])


def test_methods_without_a_prefix_are_attention_without_a_prefix():
    qkv, own = context(), prefixes(lengths=(0, 0))
    wanted = F.scaled_dot_product_attention(*qkv, enable_gqa=True)
    assert torch.equal(routed(qkv, own, [0, 1] * 4), wanted)


@pytest.mark.parametrize("queries", [T, 1])
def test_beams_share_the_route_of_their_row(queries):
    """Three rows of q behind each other are the beams of one row of the batch."""
    qkv, own, routes = context(queries=queries, batch=15), prefixes(), [3, -1, 0, 2, 3]
    beams = [route for route in routes for _ in range(3)]
    assert torch.equal(routed(qkv, own, routes), routed(qkv, own, beams))


@pytest.mark.parametrize("composition", ["gated", "add"])
def test_it_saves_what_attention_saves_and_the_prefixes(composition):
    qkv, own = context(), prefixes()
    kept = saved_bytes(lambda: routed(qkv, own, composition=composition), [*own[0], *own[1]])
    heads, small = B * H * T * D, 2 * G * sum(LENGTHS) * D
    outputs = heads if composition == "gated" else 2 * heads
    assert kept == 4 * (heads + 2 * B * G * S * D + outputs + B * H * T + small) + 8 * B


def test_trained_in_fp32_beside_bf16():
    qkv, own = context(torch.bfloat16), prefixes()
    out = routed(qkv, own)
    grads = gradients(out, torch.ones_like(out), leaves(qkv, own))
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [t.dtype for t in leaves(qkv, own)]


@pytest.mark.parametrize("empty", ["B", "T", "S"])
def test_nothing_in_a_dimension(empty):
    batch, queries, keys = (0 if empty == name else size for name, size in zip("BTS", (3, 5, 7)))
    q = torch.randn(batch, 2, queries, 4, requires_grad=True)
    kv, own = torch.randn(batch, 2, keys, 4), torch.randn(2, 3, 4, requires_grad=True)
    routes = torch.tensor([0, -1, 0][:batch], dtype=torch.int64)
    out = functional.routed_prefix_attention(q, kv, kv, routes, [own], [own])
    out.sum().backward()
    assert out.shape == q.shape and torch.isfinite(own.grad).all() and torch.isfinite(out).all()


def test_routes_are_a_tensor_to_the_compiler():
    count = 0

    def counting(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(routed_by_tensor, fullgraph=True, backend=counting)
    qkv, own = context(), prefixes()
    for routes in (ROUTES, ROUTES[::-1], [-1] * B):
        with torch.no_grad():
            found = step(qkv, own, torch.tensor(routes))
        assert torch.equal(found, routed(qkv, own, routes))
    assert count == 1


def routed_by_tensor(qkv, own, routes: Tensor) -> Tensor:
    return functional.routed_prefix_attention(*qkv, routes, *own)


@needs_cpp
def test_the_same_bits_on_any_number_of_threads():
    qkv, own = context(queries=70), prefixes()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = routed(qkv, own)
            found.append([out, *gradients(out, torch.ones_like(out), leaves(qkv, own))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_cpp
@pytest.mark.parametrize("spans, said", [
    (torch.zeros(2, 3).long(), r"spans must be contiguous int64 \(2, 2\) on the CPU"),
    (torch.zeros(2, 2), "spans must be contiguous int64"),
    (torch.zeros(2, 2).long().t(), "spans must be contiguous int64"),
    (torch.tensor([[0, 5], [8, 3]]), "at most 256 of 10 keys, got 3 from 8 on in row 1"),
    (torch.tensor([[0, 5], [-1, 3]]), "got 3 from -1 on in row 1"),
    (torch.tensor([[0, 5], [0, -3]]), "got -3 from 0 on in row 1"),
    (torch.tensor([[0, 5], [4, 3]]), "spans must not overlap, got two around key 4"),
])  # fmt: skip
def test_cpp_refuses_rows_that_are_not_there(spans, said):
    q, (k, v) = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 10, 16)
    o, lse = torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3)
    with pytest.raises(RuntimeError, match=said):
        native.ops().prefix_merge_(o, lse, q, k, v, 1.0, False, True, spans)


def refuse(kind, said, **changes):
    qkv, own = context(), prefixes()
    arguments = dict(zip("qkv", qkv), routes=torch.tensor(ROUTES), prefix_k=own[0], prefix_v=own[1])
    with pytest.raises(kind, match=said):
        functional.routed_prefix_attention(**(arguments | changes))


def test_bad_arguments_are_named():
    keys = prefixes()[0]
    other = [*keys[:2], torch.randn(G, 4, D), *keys[3:]]
    refuse(TypeError, "q must be a tensor", q=None)
    refuse(ValueError, "k must have shape", k=torch.randn(B, G, S, D + 1))
    refuse(TypeError, "routes must be a tensor, got list", routes=list(ROUTES))
    refuse(TypeError, "routes must be torch.int64, got torch.int32", routes=torch.zeros(B).int())
    refuse(ValueError, r"routes must have shape \(B\), got \(8, 1\)", routes=torch.zeros(B, 1))
    refuse(ValueError, "routes has 3 rows, which does not divide the batch of q, 8",
           routes=torch.zeros(3).long())  # fmt: skip
    refuse(ValueError, "routes has 0 rows", routes=torch.zeros(0).long())
    refuse(ValueError, r"routes must be in \[-1, 7\), -1 or a method's index, got -1 to 7",
           routes=torch.tensor([7, *ROUTES[1:]]))  # fmt: skip
    refuse(ValueError, "got -2 to 5", routes=torch.tensor([-2, *ROUTES[1:]]))
    refuse(TypeError, "prefix_k must be a list of tensors, one for each method, got Tensor",
           prefix_k=keys[0])  # fmt: skip
    refuse(ValueError, "a tensor for each method, one or more, got 0 and 7", prefix_k=[])
    refuse(ValueError, "got 6 and 7", prefix_k=keys[:6])
    refuse(ValueError, r"prefix_v\[2\] must have shape \(2, 16, 16\)", prefix_v=other)
    refuse(ValueError, r"prefix_k\[0\] must have shape \(2, P, 16\)",
           prefix_k=[torch.randn(3, 1, D), *keys[1:]])  # fmt: skip
    refuse(TypeError, r"prefix_k\[0\] must be torch.float32 or wider",
           prefix_k=[keys[0].bfloat16(), *keys[1:]])  # fmt: skip
    refuse(TypeError, r"prefix_k\[3\] must be torch.float32 like prefix_k\[0\]",
           prefix_k=[*keys[:3], keys[3].double(), *keys[4:]])  # fmt: skip
    refuse(ValueError, "attn_mask must be", attn_mask=torch.ones(3, 8, dtype=torch.bool))
    refuse(ValueError, "form='relu' has no gate", form="relu")
    refuse(ValueError, "dropout_p must be in", dropout_p=1.0)
