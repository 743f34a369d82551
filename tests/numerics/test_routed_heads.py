"""The merge of each batch row's own prefix into a context attention, and its backward, against fp64."""

import pytest
import torch

from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.ops.common.batch import Mask, keys_of, spans_of
from pelt_fast.ops.common.bundles import Dropout, RoutedPrefix
from pelt_fast.ops.common.heads import heads_last_empty
from pelt_fast.ops.prefix_attention import reference

from .judge import DEVICE, DTYPES, check, dense, seed
from .test_heads_kernels import FORMS, oracle

ROUTES = (3, -1, 0, 2, 3)
# H, Hkv, T, D, the dropout, the lengths of the methods: one without a prefix, the last without rows
CASES = {
    "one block": (4, 2, 9, 16, 0.0, (5, 1, 0, 16, 7)),
    "one block, dropped": (4, 2, 9, 16, 0.3, (5, 1, 0, 16, 7)),
    "several blocks": (2, 1, 5, 16, 0.3, (3, 1, 0, 72, 1)),
    "parts": (1, 1, 150, 16, 0.0, (8, 2, 0, 16, 4)),
}
every = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("case", CASES),
    pytest.mark.parametrize("form, composition", FORMS),
]


def every_case(test):
    for mark in every:
        test = mark(test)
    return test


def make(case, dtype):
    """q, pk, pv, the context's o and lse; and where each row's keys are."""
    H, G, T, D, _, lengths = CASES[case]
    B = len(ROUTES)
    q = dense(B, T, H, D, dtype=dtype).transpose(1, 2)
    pk, pv = (dense(G, sum(lengths), D + 2)[..., :D].to(dtype).float() for _ in range(2))
    context_o, context_lse = dense(B, H, T, D, dtype=dtype), dense(B, H, T + 5)[..., :T]
    context_lse[..., 0] = float("-inf")
    context_o[..., 0, :] = float("nan")
    prefix = RoutedPrefix(pk, pv, torch.tensor(ROUTES, device=DEVICE), lengths)
    where = dict(spans=spans_of(prefix), longest=max(lengths))
    return (q, pk, pv, context_o, context_lse), where, keys_of(prefix)


def routed_oracle(tensors, where, *settings):
    """Each row on its own prefix; the masks are those of the whole batch."""
    q, pk, pv, context_o, context_lse = tensors
    (*form, p, row), results = settings, []
    like = torch.empty(1, *q.shape[1:3], where["longest"], dtype=q.dtype, device=q.device)
    for b, (first, length) in enumerate(where["spans"].tolist()):
        one, keys = slice(b, b + 1), slice(first, first + length)
        own = context_lse[one].to(torch.promote_types(q.dtype, torch.float32))
        if length == 0:
            hidden = (own == float("-inf")).unsqueeze(-1)
            results.append((context_o[one].masked_fill(hidden, 0), own))
            continue
        drop = Dropout(p, None if row is None else row.view(1, 2))
        factor = reference._drop_factor(like, drop, 0, Mask(range(b, b + 1), like.shape[-1]))
        factor = factor if row is None else factor[..., :length]
        part = q[one], pk[:, keys], pv[:, keys], context_o[one], context_lse[one]
        results.append(oracle(*part, *form, p, None, factor))
    return tuple(torch.cat(column) for column in zip(*results))


@every_case
def test_merge_matches_fp64_oracle(case, dtype, form, composition):
    tensors, where, _ = make(case, dtype)
    q, p = tensors[0], CASES[case][4]
    row = seed() if p else None
    settings = dict(scale=0.2, form=form, composition=composition, dropout_p=p, seed=row)
    o = heads_last_empty(q)
    lse = prefix_merge(*tensors, o, **settings, **where)
    want, want_lse = routed_oracle(tuple(t.double() for t in tensors), where, *settings.values())
    same, same_lse = routed_oracle(tensors, where, *settings.values())
    check(o, same, want, dtype)
    seen = want_lse > float("-inf")
    assert torch.equal(lse > float("-inf"), seen)
    check(lse[seen], same_lse[seen], want_lse[seen], torch.float32)
    none = [b for b, method in enumerate(ROUTES) if method < 0 or CASES[case][-1][method] == 0]
    assert torch.equal(o[none, :, 1:], tensors[3][none, :, 1:])  # the same bits
    assert torch.equal(lse[none], tensors[4][none])


@every_case
def test_merge_bwd_matches_fp64_oracle(case, dtype, form, composition):
    tensors, where, methods = make(case, dtype)
    q, pk, pv, context_o, context_lse = tensors
    context_o[..., 0, :], context_lse[..., 0] = 0, 0
    do, dq0 = dense(*q.shape, dtype=dtype), dense(*q.shape, dtype=dtype)
    p = CASES[case][4]
    row = seed() if p else None
    settings = dict(scale=0.2, form=form, composition=composition, dropout_p=p, seed=row)

    def gradients(kind):
        leaves = [t.detach().to(kind).requires_grad_() for t in (q, pk, pv)]
        context = (context_o.to(kind), context_lse.to(torch.promote_types(kind, torch.float32)))
        out, _ = routed_oracle((*leaves, *context), where, *settings.values())
        dq, dpk, dpv = torch.autograd.grad(out, leaves, do.to(kind))
        return dq + dq0.to(kind), dpk, dpv

    o = heads_last_empty(q)
    lse = prefix_merge(*tensors, o, **settings, **where)
    dq, whole = dq0.clone(), where | dict(methods=methods)
    actual = (dq, *prefix_merge_bwd(do, q, pk, pv, o, lse, dq, **settings, **whole))
    for got, same, want in zip(actual, gradients(dtype), gradients(torch.float64)):
        check(got, same, want, dtype)
    unrouted = slice(sum(CASES[case][-1][:-1]), None)
    assert not actual[1][:, unrouted].any() and not actual[2][:, unrouted].any()
    alone = prefix_merge_bwd(do, q, pk, pv, o, lse, None, **settings, **whole)
    assert all(torch.equal(a, b) for a, b in zip(alone, actual[1:])) or form == "relu"


def test_one_method_of_all_rows_has_the_bits_of_one_prefix():
    tensors, _, _ = make("parts", torch.float32)
    q, pk, pv, *_ = tensors
    prefix = RoutedPrefix(pk, pv, torch.zeros(len(ROUTES), dtype=torch.int64), (pk.shape[1],))
    where = dict(spans=spans_of(prefix).to(DEVICE), longest=pk.shape[1])
    settings = dict(scale=0.2, form="softmax", composition="gated")
    outs = [heads_last_empty(q) for _ in range(2)]
    lses = [prefix_merge(*tensors, o, **settings, **own) for o, own in zip(outs, ({}, where))]
    assert torch.equal(*outs) and torch.equal(*lses)
