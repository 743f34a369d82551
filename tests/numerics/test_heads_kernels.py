"""The merge of a prefix into a context attention, and its backward, against fp64."""

import pytest
import torch

from pelt_fast.kernels import config
from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.ops.common.batch import Mask
from pelt_fast.ops.common.bundles import Dropout
from pelt_fast.ops.common.heads import heads_last_empty
from pelt_fast.ops.prefix_attention import reference

from .judge import DTYPES, check, dense, seed

FORMS = [("softmax", "gated"), ("softmax", "add"), ("relu", "add")]
# B, H, Hkv, T, P, D
SHAPES = [
    (1, 1, 1, 1, 1, 32),
    (2, 4, 2, 37, 5, 32),
    (2, 2, 1, 70, 30, 64),
    (1, 2, 2, 17, 72, 40),
    (1, 1, 1, 9, 200, 16),
    (1, 1, 1, 3, 1024, 8),
    (1, 2, 1, 5, 3, 256),
]
IDS = ["x".join(map(str, shape)) for shape in SHAPES]
every = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("shape", SHAPES, ids=IDS),
    pytest.mark.parametrize("form, composition", FORMS),
    pytest.mark.parametrize("p", [0.0, 0.3]),
]


def every_case(test):
    for mark in every:
        test = mark(test)
    return test


def make(shape, dtype, hidden=False):
    B, H, G, T, P, D = shape
    q = dense(B, T, H, D, dtype=dtype).transpose(1, 2)
    pk, pv = (dense(G, P, D + 2)[..., :D].to(dtype).float() for _ in range(2))
    context_o, context_lse = dense(B, H, T, D, dtype=dtype), dense(B, H, T + 5)[..., :T]
    if hidden:
        context_lse[..., 0] = float("-inf")
        context_o[..., 0, :] = float("nan")
    return q, pk, pv, context_o, context_lse


def oracle(q, pk, pv, context_o, context_lse, scale, form, composition, p, row, factor=None):
    """The definition on a given context, in the tensors' own dtype. ``factor``: that of the dropout,
    by default of a whole batch."""
    heads, kind = q.shape[1], q.dtype
    pk, pv = (reference.expand_heads(t.to(kind), heads) for t in (pk, pv))
    z = scale * q @ pk.transpose(-1, -2)
    own = context_lse.to(torch.promote_types(kind, torch.float32))
    context_o = context_o.masked_fill((own == float("-inf")).unsqueeze(-1), 0)
    if factor is None:
        drop = Dropout(p, None if row is None else row.view(1, 2))
        factor = reference._drop_factor(z, drop, 0, Mask(range(z.shape[0]), z.shape[-1]))
    if composition == "add":
        w = torch.softmax(z, -1) if form == "softmax" else z.clamp_min(0)
        return context_o + (factor * w) @ pv, own
    joint = torch.logaddexp(own, torch.logsumexp(z.to(own.dtype), -1))
    w = torch.exp(z - joint.unsqueeze(-1)).to(kind)
    return (torch.exp(own - joint).unsqueeze(-1) * context_o + (factor * w) @ pv).to(kind), joint


@every_case
def test_merge_matches_fp64_oracle(shape, dtype, form, composition, p):
    tensors, scale, row = make(shape, dtype, hidden=True), shape[-1] ** -0.5, seed() if p else None
    o = heads_last_empty(tensors[0])
    settings = dict(scale=scale, form=form, composition=composition, dropout_p=p, seed=row)
    lse = prefix_merge(*tensors, o, **settings)
    want, want_lse = oracle(*(t.double() for t in tensors), scale, form, composition, p, row)
    same, same_lse = oracle(*tensors, scale, form, composition, p, row)
    check(o, same, want, dtype)
    finite = torch.isfinite(want_lse)
    assert torch.equal(finite, torch.isfinite(lse))
    if finite.any():
        check(lse[finite], same_lse[finite], want_lse[finite], dtype)


@every_case
def test_merge_bwd_matches_fp64_oracle(shape, dtype, form, composition, p):
    q, pk, pv, context_o, context_lse = make(shape, dtype)
    scale, row = shape[-1] ** -0.5, seed() if p else None
    do, dq0 = dense(*q.shape, dtype=dtype), dense(*q.shape, dtype=dtype)
    settings = dict(scale=scale, form=form, composition=composition, dropout_p=p, seed=row)

    def gradients(kind):
        """By autograd: of q and the prefix, the context held fixed, as the context kernel's own
        backward has its share from the joint lse."""
        leaves = [t.detach().to(kind).requires_grad_() for t in (q, pk, pv)]
        context = (context_o.to(kind), context_lse.to(torch.promote_types(kind, torch.float32)))
        out, _ = oracle(*leaves, *context, scale, form, composition, p, row)
        dq, dpk, dpv = torch.autograd.grad(out, leaves, do.to(kind))
        return dq + dq0.to(kind), dpk, dpv

    # the prefix's share of dq, as autograd sees it through the joint lse, is the kernel's: with
    # o and l joint, d(exp(l_c - l) o_c) is inside δ
    o = heads_last_empty(q)
    lse = prefix_merge(q, pk, pv, context_o, context_lse, o, **settings)
    dq = dq0.clone()
    actual = (dq, *prefix_merge_bwd(do, q, pk, pv, o, lse, dq, **settings))
    judged = list(zip(gradients(dtype), gradients(torch.float64)))
    for got, (same, want) in zip(actual, judged):
        check(got, same, want, dtype)
    without_dq = prefix_merge_bwd(do, q, pk, pv, o, lse, None, **settings)
    for got, (same, want) in zip(without_dq, judged[1:]):
        check(got, same, want, dtype)
    again = prefix_merge_bwd(do, q, pk, pv, o, lse, dq0.clone(), **settings)
    assert all(torch.equal(a, b) for a, b in zip(again, actual[1:]))


@pytest.mark.parametrize("form, composition", FORMS)
def test_prefix_alone_where_there_is_no_context(form, composition):
    q, pk, pv, *_ = make((2, 4, 2, 9, 6, 32), torch.float32)
    settings = dict(scale=0.2, form=form, composition=composition)
    o = heads_last_empty(q)
    prefix_merge(q, pk, pv, None, None, o, **settings)
    nothing = torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"), device=q.device)
    want, _ = oracle(*(t.double() for t in (q, pk, pv, *nothing)), 0.2, form, composition, 0, None)
    check(o, want.float(), want, torch.float32)


def test_equal_scores_have_equal_weights_whatever_their_size():
    """Exactly 1 / P in the backward of an added softmax, where exp(Z - l) would round Z - l."""
    q, pk, do = torch.ones(1, 1, 1, 16), torch.full((1, 64, 16), 10.0), dense(1, 1, 1, 16)
    q, pk = q.to(do.device), pk.to(do.device)
    settings = dict(scale=0.5, form="softmax", composition="add")
    o, lse = torch.zeros_like(q), torch.zeros_like(q[..., 0])
    _, dpv = prefix_merge_bwd(do, q, pk, torch.ones_like(pk), o, lse, None, **settings)
    assert torch.equal(dpv, (do[0, 0] / 64).expand_as(dpv[0])[None])


def test_splits_of_the_queries_only_change_the_order_of_sums(monkeypatch):
    q, pk, pv, context_o, context_lse = make((1, 2, 1, 150, 7, 32), torch.float32)
    do, o = dense(*q.shape), heads_last_empty(q)
    settings = dict(scale=0.2, form="softmax", composition="gated")
    lse = prefix_merge(q, pk, pv, context_o, context_lse, o, **settings)
    results = []
    for processors in (1, 40):
        monkeypatch.setattr(config, "processors", lambda device, n=processors: n)
        results.append(prefix_merge_bwd(do, q, pk, pv, o, lse, None, **settings))
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)
