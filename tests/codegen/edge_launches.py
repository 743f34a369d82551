"""Launches at the edges: sizes of 1, sizes that divide nothing, offsets that no 32 bits hold."""

from collections.abc import Iterator

import torch

from pelt_fast.kernels.adapter import adapter
from pelt_fast.kernels.config import FUSED_RANK
from pelt_fast.kernels.ffn_act import ffn_act, ffn_act_bwd
from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.kernels.mask import dropout
from pelt_fast.kernels.norm import moments, norm_bwd, norm_gradients
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.tail_gemm import tail_gemm
from pelt_fast.kernels.widened_ffn import widened_act, widened_act_bwd

from .launch import SEED, Launch, P, empty
from .routed_launches import routed_calls, routed_factors


def ugly(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Sizes of 1 (which the launcher makes constants), and sizes that divide nothing."""
    name = str(dtype).removeprefix("torch.")
    for m, k, n, r in ((1, 1, 1, 1), (5, 17, 23, 3)):

        def calls(m=m, k=k, n=n, r=r):
            x, dy, s = empty(m, k, dtype=dtype), empty(m, n, dtype=dtype), empty(m, r, dtype=dtype)
            a, b = empty(r, k, dtype=torch.float32), empty(n, r, dtype=torch.float32)
            d, u = empty(r, dtype=torch.float32), empty(n, dtype=torch.float32)
            for drop in (dict(), dict(dropout_p=P, seed=SEED)):
                rank_down(x, a, d, activation="gelu_tanh", **drop)
                rank_down_bwd(s, x, torch.float32, with_bias=True, **drop)
                if r <= FUSED_RANK["rank_up_bwd"]:
                    for f in ("silu", "identity"):
                        rank_up_bwd(dy, s, b, activation=f, need_bias=True, **drop)
                tail_gemm(x, empty(n, k, dtype=dtype).t(), s, b.t(), bias=u.to(dtype), **drop)
                adapter(x, dy, a, d, b, u, norm=(empty(k), empty(k)), activation="tanh", **drop)
            few, norm = empty(2, m, dtype=torch.float32), (empty(k), empty(k))
            rank_down(x, a, d, norm=(moments(x), *norm))
            norm_bwd(s, s, x, a, d, *norm, x)
            norm_gradients(s, x, few, a, *norm)
            rank_up(s, b, dy, bias=u, base_dropout_p=P, seed=SEED)
            rank_up(s, a.t(), x, out=x, update_dropout_p=P, seed=SEED)
            dropout(x, P, SEED)
            dropout(x, P, SEED, bias=empty(k), out=x)
            pre = empty(m, k + r, dtype=dtype)
            common = dict(
                gated=False, ffn_activation="relu", activation="silu", seed_h=SEED, dropout_p=P
            )
            widened_act(pre, pre, k, r, **common)
            widened_act_bwd(pre, pre, s, k, r, scale=1.0, **common)
            widened_act_bwd(None, s, s, 0, r, scale=1.0, **common)
            for gate in (None, x):
                ffn_act_bwd(ffn_act(x, gate, "silu"), x, gate, "silu", dropout_p=P, seed=SEED)
            q, lse = (
                empty(1, m, 1, k, dtype=dtype).transpose(1, 2),
                empty(1, 1, m, dtype=torch.float32),
            )
            prefix = [empty(1, r, k, dtype=torch.float32) for _ in range(2)]
            common = dict(scale=0.1, form="softmax", dropout_p=P, seed=SEED)
            for composition in ("gated", "add"):
                prefix_merge(q, *prefix, None, None, q, composition=composition, **common)
                prefix_merge_bwd(q, q, *prefix, q, lse, q, composition=composition, **common)

            factors = routed_factors([r], dtype, k, n)
            for call in routed_calls(x, dy, factors, [r], SEED.view(1, 2), "silu").values():
                call()

        yield Launch(f"ugly {m}x{k}x{n} R={r} {name}", calls)


def huge(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Rows 2^33 elements apart: offsets no 32 bits hold."""

    def far(*shape):
        strides = (*(2**33 for _ in shape[:-1]), 1)
        return torch.empty_strided(shape, strides, dtype=dtype, device="meta")

    m, k, r, f = 64, 64, 16, 128
    x, dy, s, base = far(m, k), far(m, k), far(m, r), far(m, k)
    a, b, d, u = (torch.empty(*n, device="meta") for n in ((r, k), (k, r), (r,), (k,)))
    norm = (torch.empty(k, device="meta"), torch.empty(k, device="meta"))
    pre, act, q = far(m, f + r), far(m, f + r), far(2, 2, m, k)
    prefix = [torch.empty(2, 30, k, device="meta") for _ in range(2)]
    lse = torch.empty(2, 2, m, device="meta")
    attention = dict(scale=0.1, form="softmax", composition="gated")
    spans = torch.empty(2, 2, dtype=torch.int64, device="meta")
    routed = dict(attention, spans=spans, longest=30)
    common = dict(gated=False, ffn_activation="gelu", activation="relu")
    calls = dict(
        rank_down=lambda: rank_down(x, a), rank_down_bwd=lambda: rank_down_bwd(s, x, torch.float32),
        rank_up=lambda: rank_up(s, b, base, out=base),
        rank_up_bwd=lambda: rank_up_bwd(dy, s, b, dt=far(m, r)),
        dropout=lambda: dropout(x, P, torch.empty(2, dtype=torch.int64, device="meta"), u, out=x),
        adapter=lambda: adapter(x, base, a, d, b, u), moments=lambda: moments(x),
        norm_bwd=lambda: norm_bwd(s, s, x, a, d, *norm, dy),
        tail_gemm=lambda: tail_gemm(x, far(k, k).t(), s, b.t()),
        widened_act=lambda: widened_act(pre, act, f, r, **common),
        widened_act_bwd=lambda: widened_act_bwd(pre, act, s, f, r, scale=1.0, **common),
        ffn_act=lambda: ffn_act(act, act, "silu"),
        ffn_act_bwd=lambda: ffn_act_bwd(act, act, act, "silu"),
        prefix=lambda: prefix_merge(q, *prefix, q, lse, q, **attention),
        prefix_bwd=lambda: prefix_merge_bwd(q, q, *prefix, q, lse, q, **attention),
        routed=lambda: prefix_merge(q, *prefix, q, lse, q, **routed),
        routed_bwd=lambda: prefix_merge_bwd(q, q, *prefix, q, lse, q, methods=spans, **routed),
    )  # fmt: skip
    for name, call in calls.items():
        yield Launch(f"huge {name}", call)
