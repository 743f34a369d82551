"""Launches of kernels that serve a batch with a method for each row."""

from collections.abc import Callable, Iterator

import torch

from pelt_fast.kernels.heads import prefix_merge
from pelt_fast.kernels.heads_bwd import prefix_merge_bwd
from pelt_fast.ops.common import bundles
from pelt_fast.ops.routed import gpu as many

from .launch import SEED, K, Launch, M, N, P, empty


def routed_heads(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    """A prefix for each row of the batch."""
    name = str(dtype).removeprefix("torch.")
    B, H, T, dim = 16, 16, 1024, 64
    q, lse = empty(B, T, H, dim, dtype=dtype).transpose(1, 2), empty(B, H, T, dtype=torch.float32)
    prefix = [empty(H, 4 * 200, dim, dtype=torch.float32) for _ in range(2)]
    spans, methods = (empty(n, 2, dtype=torch.int64) for n in (B, 4))
    for length in (30, 200):
        for form, composition in (("softmax", "gated"), ("softmax", "add"), ("relu", "add")):
            for seed in (None, SEED) if composition == "gated" else (None,):
                p = 0.0 if seed is None else P
                settings = dict(
                    scale=0.1, form=form, composition=composition, dropout_p=p, seed=seed,
                    spans=spans, longest=length,
                )  # fmt: skip
                tag = f"P={length} {form} {composition} {name} p={p}"
                yield Launch(
                    f"prefix routed {tag}",
                    lambda s=settings: prefix_merge(q, *prefix, q, lse, q, **s), True,
                )  # fmt: skip
                yield Launch(
                    f"prefix_bwd routed {tag}",
                    lambda s=settings: prefix_merge_bwd(
                        q, q, *prefix, q, lse, q, methods=methods, **s), True,
                )  # fmt: skip


def routed(target: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Methods of several ranks; where 8 divides none of them, not streaming."""
    name = str(dtype).removeprefix("torch.")
    x, dy = empty(M, K, dtype=dtype), empty(M, N, dtype=dtype)
    for ranks in ([8, 16, 32], [3, 100], [8, 512]):
        weights = routed_factors(ranks, dtype, K, N)
        for seeds, activation in (
            (None, "identity"),
            (torch.empty(3, 2, dtype=torch.int64), "gelu"),
        ):
            calls = routed_calls(x, dy, weights, ranks, seeds, activation)
            for call_name, call in calls.items():
                tag = f"R={ranks} {activation} {name} p={0.0 if seeds is None else P}"
                yield Launch(f"{call_name} {tag}", call)


def routed_factors(ranks: list[int], dtype: torch.dtype, k: int, n: int) -> tuple:
    total = sum(ranks)
    down = bundles.RoutedDown(*(empty(*s, dtype=torch.float32) for s in ((total, k), (total,))))
    shapes = (n * total,), (len(ranks), n)
    return down, bundles.RoutedUp(*(empty(*s, dtype=torch.float32) for s in shapes))


def routed_calls(x, dy, factors, ranks, seeds, activation: str) -> dict[str, Callable]:
    """The four ops. Their numbers of the host are read, the segments are not."""
    (down, up), most = factors, max(ranks)
    t = torch.empty_like(x[:, :1]).expand(-1, most) if x.is_meta else x.new_empty(len(x), most)
    where = bundles.Segments(torch.empty(16, 4, dtype=torch.int64, device=x.device), ranks)
    drop = bundles.RoutedDropout([] if seeds is None else [P] * len(ranks), seeds)
    transform = bundles.RoutedTransform(activation, [2.0] * len(ranks))
    needs = [True] * 3
    return dict(
        routed_down=lambda: many.down_forward(x, down, where, drop),
        routed_down_bwd=lambda: many.down_backward(t, x, x, down[0], where, drop, needs),
        routed_up=lambda: many.up_forward(dy, t, up, where, transform, drop),
        routed_up_bwd=lambda: many.up_backward(dy, t, up[0], where, transform, drop, needs),
    )
