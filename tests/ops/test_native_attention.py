"""Attention with dropout on its weights: the C++ pass and the library's products against the
specification in fp64, which draws the same masks. ``test_native_products`` runs this file on every
instruction set."""

import pytest
import torch

from pelt_fast.ops.common import dropped_attention, native
from pelt_fast.ops.common.bundles import (
    QKV,
    AttentionOutput,
    Dropout,
    Form,
    Prefix,
    RoutedPrefix,
    Scores,
)
from pelt_fast.ops.prefix_attention import reference
from tests.ops.exactly import DTYPES, close

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))

FORMS = [Form("softmax", "gated"), Form("softmax", "add"), Form("relu", "add")]
SIZES = [  # batch, heads, heads of keys, queries, keys, head dim, length of the prefix
    (1, 1, 1, 1, 3, 8, 2), (2, 4, 2, 5, 7, 16, 30), (3, 2, 2, 130, 130, 8, 3), (2, 3, 1, 9, 200, 64, 129),
    (2, 2, 2, 6, 6, 8, 0), (2, 2, 1, 6, 0, 8, 4),
]  # fmt: skip
WHOLE = reference.prefix_attention_forward, reference.prefix_attention_backward
ROUTED = reference.routed_prefix_forward, reference.routed_prefix_backward


def drawn(p: float = 0.3) -> Dropout:
    return Dropout(p, torch.randint(0, 2**62, (2, 2))) if p else Dropout(0.0, None)


def inputs(size, dtype, lengths=None) -> tuple[QKV, Prefix]:
    b, h, g, t, s, d, p = size
    q, k, v = (
        torch.randn(b, n, m, d, dtype=dtype).transpose(1, 2) for n, m in ((t, h), (s, g), (s, g))
    )
    total = p if lengths is None else sum(lengths)
    return QKV(q, k, v), Prefix(*torch.randn(2, g, total, d))


def exact(bundle):
    """The same in fp64."""
    return type(bundle)(*(
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in bundle
    ))  # fmt: skip


def as_close(found, wanted, plain, terms: int) -> None:
    """Within the budget, or as close as the specification itself in fp32: differences cancel."""
    if (found.double() - wanted).norm() > 2 * (plain.double() - wanted).norm():
        close(found, wanted, terms)


def check(qkv, prefix, scores, form, drop, specification) -> None:
    forward, backward = specification
    terms = sum(qkv.k.shape[2:]) + prefix.prefix_k.shape[1]
    wide = exact(qkv), exact(prefix), scores, form, drop
    wanted = forward(*wide)
    found = dropped_attention.forward(qkv, prefix, scores, form, drop)
    assert torch.equal(found[1].isinf(), wanted[1].isinf())
    for a, b in zip(found[:3], wanted[:3]):
        close(a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0), terms)

    do, needs = torch.randn_like(qkv.q), [True] * 5
    given = AttentionOutput(*found)
    wanted = backward(do.double(), *wide[:2], exact(given), *wide[2:], needs)
    plain = backward(do, qkv, prefix, given, scores, form, drop, needs)
    found = dropped_attention.backward(do, qkv, prefix, given, scores, form, drop, needs)
    for a, b, c in zip(found, wanted, plain):
        as_close(a, b, c, 4 * terms)
    some = dropped_attention.backward(
        do, qkv, prefix, given, scores, form, drop, [True, False, True, False, True]
    )
    assert [grad.numel() for grad in some[1::2]] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(some[::2], found[::2]))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_gradients(form, size, dtype, p):
    check(*inputs(size, dtype), Scores(None, False, 0.4), form, drawn(p), WHOLE)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [6, 11])
@pytest.mark.parametrize("kind", ["none", "bool", "padding", "additive", "hidden rows"])
def test_masks(kind, keys, causal, form):
    qkv, prefix = inputs((2, 4, 2, 6, keys, 8, 5), torch.float32)
    mask = {
        "none": None,
        "bool": torch.rand(2, 1, 6, keys) < 0.7,
        "padding": (torch.rand(2, 1, 1, keys) < 0.7).expand(2, 1, 6, keys),
        "additive": torch.randn(1, 4, 6, keys),
        "hidden rows": torch.rand(6, keys) < 0.3,
    }[kind]
    check(qkv, prefix, Scores(mask, causal, 0.4), form, drawn(), WHOLE)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("routes", [[0, 1, 2, -1], [1, 1, 1, 1], [-1, -1, -1, -1], [2, 0, -1, 2]])
def test_a_prefix_for_each_row(routes, form):
    lengths = [3, 0, 20]
    qkv, keys = inputs((4, 4, 2, 9, 10, 8, 0), torch.float32, lengths)
    prefix = RoutedPrefix(*keys, torch.tensor(routes), lengths)
    check(qkv, prefix, Scores(None, False, 0.4), form, drawn(), ROUTED)


def test_many_pieces_are_one(monkeypatch):
    """Pieces of any size draw the masks of the whole."""
    qkv, prefix = inputs((2, 4, 2, 9, 10, 8, 5), torch.float32)
    call = (qkv, prefix, Scores(None, False, 0.4), FORMS[0], drawn())
    whole = dropped_attention.forward(*call)
    for elements in (1, 300, 600):  # two heads, two heads, a row
        monkeypatch.setattr(dropped_attention, "block_elements", lambda device, n=elements: n)
        pieces = dropped_attention.forward(*call)
        for a, b in zip(whole, pieces):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def weights(context=(2, 3, 4), prefix=(2, 3, 5), lse=(2, 3), mask=None, causal=False, seed=None,
            threshold=0, first=0, width=5):  # fmt: skip
    return native.ops().attention_weights_(
        torch.zeros(context), torch.zeros(prefix), torch.zeros(lse), mask, causal, 1.0, False, True,
        seed, threshold, 1.0, first, width,
    )  # fmt: skip


@pytest.mark.parametrize("wrong, said", [
    (dict(context=(3, 4)), r"context must have shape \(N, T, S\), got \(3, 4\)"),
    (dict(prefix=(2, 4, 5)), r"prefix must have shape \(2, 3, P\), got \(2, 4, 5\)"),
    (dict(lse=(2, 4)), "lse must have the shape of"),
    (dict(causal=True), "causal needs T = S, got 3 and 4"),
    (dict(mask=torch.zeros(1, 2, 3, 5)), r"mask must be float32 \(rows, heads, 3, 4\) of 2 heads"),
    (dict(seed=torch.zeros(2, dtype=torch.int64)), r"seed must be int64 \(2, 2\) on the CPU"),
    (dict(seed=torch.zeros(2, 2, dtype=torch.int64), threshold=70000), "threshold must be in"),
    (dict(first=-1), "first must be at least 0 and width at least 5, got -1 and 5"),
    (dict(width=4), "first must be at least 0 and width at least 5, got 0 and 4"),
])  # fmt: skip
def test_bad_arguments_are_named(wrong, said):
    weights()
    with pytest.raises(RuntimeError, match=said):
        weights(**wrong)
