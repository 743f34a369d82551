"""Prefixes that C++ takes in parts: against the specification in fp64."""

import pytest
import torch

from pelt_fast.ops.common import native
from pelt_fast.ops.common.bundles import AttentionOutput, Dropout, Form, RoutedPrefix, Scores
from pelt_fast.ops.prefix_attention import cpu, reference
from tests.ops.test_native_attention import FORMS, as_close, exact, inputs

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))

NO_DROPOUT, LONG = Dropout(0.0, None), cpu.MAX_PREFIX + 1
SIZES = [  # batch, heads, heads of keys, queries, keys, head dim, length of the prefix
    (1, 2, 2, 5, 7, 16, LONG), (2, 4, 2, 70, 40, 64, 600), (2, 2, 1, 1, 9, 16, 1025),
    (2, 2, 1, 12, 0, 24, 300),
]  # fmt: skip
SUMS = [Form("softmax", "gated"), Form("relu", "add")]


def check(qkv, prefix, scores, form, forward, backward) -> None:
    specified, gradients = forward[1], backward[1]
    terms = sum(qkv.k.shape[2:]) + prefix.prefix_k.shape[1]
    wide = exact(qkv), exact(prefix), scores, form, NO_DROPOUT
    wanted = specified(*wide)
    found = forward[0](qkv, prefix, scores, form, NO_DROPOUT)
    plain = specified(qkv, prefix, scores, form, NO_DROPOUT)
    for a, b, c in zip(found[:2], wanted[:2], plain[:2]):
        as_close(
            a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0), c.nan_to_num(neginf=0.0), terms
        )

    do, needs = torch.randn_like(qkv.q), [True] * 5
    given = AttentionOutput(*found)
    wanted = gradients(do.double(), *wide[:2], exact(given), *wide[2:], needs)
    plain = gradients(do, qkv, prefix, given, scores, form, NO_DROPOUT, needs)
    found = backward[0](do, qkv, prefix, given, scores, form, NO_DROPOUT, needs)
    for a, b, c in zip(found, wanted, plain):
        as_close(a, b, c, 4 * terms)


WHOLE = (
    (cpu.prefix_attention_forward, reference.prefix_attention_forward),
    (cpu.prefix_attention_backward, reference.prefix_attention_backward),
)
ROUTED = (
    (cpu.routed_prefix_forward, reference.routed_prefix_forward),
    (cpu.routed_prefix_backward, reference.routed_prefix_backward),
)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forward_and_gradients(form, size):
    check(*inputs(size, torch.float32), Scores(None, False, size[5] ** -0.5), form, *WHOLE)


@pytest.mark.parametrize("form", SUMS, ids=str)
@pytest.mark.parametrize("hidden", [False, True], ids=["some keys", "some rows see none"])
def test_masks(hidden, form):
    qkv, prefix = inputs((2, 4, 2, 6, 11, 16, 300), torch.float32)
    mask = (torch.rand(6, 1) < 0.5).expand(6, 11) if hidden else torch.rand(2, 1, 6, 11) < 0.7
    check(qkv, prefix, Scores(mask, False, 0.25), form, *WHOLE)


@pytest.mark.parametrize("form", SUMS, ids=str)
def test_a_prefix_for_each_row(form):
    lengths = [LONG, 0, 20]
    qkv, keys = inputs((4, 4, 2, 9, 10, 16, 0), torch.float32, lengths)
    routes = torch.tensor([0, 1, 2, -1])
    check(qkv, RoutedPrefix(*keys, routes, lengths), Scores(None, False, 0.25), form, *ROUTED)


@pytest.mark.parametrize("form", SUMS, ids=str)
def test_a_sum_needs_no_library(form, monkeypatch):
    def library(*_):
        pytest.fail("the library multiplied")

    monkeypatch.setattr(cpu, "merge_by_blocks", library)
    monkeypatch.setattr(cpu, "gradients_by_blocks", library)
    qkv, prefix = inputs((2, 2, 2, 12, 5, 16, 3 * LONG), torch.float32)
    scores = Scores(None, False, 0.25)
    output = cpu.prefix_attention_forward(qkv, prefix, scores, form, NO_DROPOUT)
    do = torch.randn_like(qkv.q)
    some = cpu.prefix_attention_backward(
        do, qkv, prefix, AttentionOutput(*output), scores, form, NO_DROPOUT,
        [False, False, False, True, True],
    )  # fmt: skip
    assert [grad.numel() for grad in some[:3]] == [0, 0, 0]
    assert [grad.shape for grad in some[3:]] == [prefix.prefix_k.shape] * 2


def test_parts_are_of_about_one_length():
    for length in (1, 256, 257, 512, 513, 2000):
        _, prefix = inputs((1, 1, 1, 1, 1, 16, length), torch.float32)
        sizes = [part.prefix_k.shape[1] for part in cpu._parts(prefix)]
        assert sum(sizes) == length and max(sizes) <= cpu.MAX_PREFIX
        assert len(sizes) == -(-length // cpu.MAX_PREFIX)
