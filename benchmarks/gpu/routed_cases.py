"""The kernels of many methods in one batch, and the same in plain PyTorch: a loop over methods."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pelt_fast.kernels.routed import routed_rows
from pelt_fast.kernels.routed_down import routed_down, routed_down_bwd
from pelt_fast.kernels.routed_up import routed_up, routed_up_bwd
from pelt_fast.ops.common.bundles import RoutedDown, RoutedDropout, RoutedTransform, RoutedUp
from pelt_fast.ops.routed.segments import segments_of

from .kernel_case import KernelCase, P, Sizes, drawn

METHODS, SCALE = 4, 2.0  # in one batch; of every update


@dataclass(frozen=True)
class Plain:
    """``rows`` of each method; x (M, K), base and dy (M, K), t (M, R), a (G, R, K), b (G, K, R)."""

    rows: list[Tensor]
    x: Tensor
    base: Tensor
    t: Tensor
    a: Tensor
    b: Tensor

    def down(self, drop: Callable, p: float) -> tuple[Tensor]:
        """T = drop(x) Aᵀ."""
        t = torch.empty_like(self.t)
        for own, a in zip(self.rows, self.a.to(t.dtype)):
            t[own] = drop(self.x[own], p) @ a.t()
        return (t,)

    def down_bwd(self, drop: Callable, p: float) -> tuple[Tensor]:
        """dA = Tᵀ drop(x)."""
        parts = [self.t[own].float().t() @ drop(self.x[own], p).float() for own in self.rows]
        return (torch.cat(parts),)

    def up(self, drop: Callable, p: float) -> tuple[Tensor]:
        """y = base + s drop(T) Bᵀ."""
        y = self.base.clone()
        for own, b in zip(self.rows, self.b.to(y.dtype)):
            y[own] += SCALE * drop(self.t[own], p) @ b.t()
        return (y,)

    def up_bwd(self, drop: Callable, p: float) -> tuple[Tensor, Tensor]:
        """dT = drop(s dy B), dB = s dyᵀ drop(T); dy is x."""
        dt, parts = torch.empty_like(self.t), []
        for own, b in zip(self.rows, self.b.to(dt.dtype)):
            dy = self.x[own]
            dt[own] = drop(SCALE * dy @ b, p)
            parts.append((SCALE * dy.float().t() @ drop(self.t[own], p).float()).flatten())
        return dt, torch.cat(parts)


def routed(device, sizes: Sizes, dtype, seed) -> Iterator[KernelCase]:
    """LoRA of several methods on rows that alternate between them: both products, both backward."""
    randn, M, K, e = drawn(device, dtype), sizes.m, sizes.k, dtype.itemsize
    x, base = randn(M, K), randn(M, K)
    routes = torch.arange(math.gcd(M, 16)) % METHODS
    methods = routes.repeat_interleave(M // len(routes))
    own = [(methods == g).nonzero()[:, 0].to(device) for g in range(METHODS)]
    routes = routes.to(device)
    transform, needs = RoutedTransform("identity", [SCALE] * METHODS), [True, True, False]
    for R in sizes.ranks:
        rows = routed_rows(segments_of(routes, M, [R] * METHODS), M)
        a = randn(METHODS, R, K, of=torch.float32) / K**0.5
        b = randn(METHODS, K, R, of=torch.float32) / R**0.5
        plain = Plain(own, x, base, randn(M, R), a, b)
        t, down, up = plain.t, RoutedDown(a.view(-1, K), None), RoutedUp(b.view(-1), None)
        passes, small, flops = e * M * K, e * M * R + 4 * METHODS * R * K, 2 * M * K * R
        for p in (0.0, P):
            seeds = seed.expand(METHODS, 2).contiguous() if p else None
            drop, tag = RoutedDropout([p] * METHODS if p else [], seeds), f"R={R} p={p}"
            yield KernelCase(
                "routed_down", tag, lambda: (routed_down(x, down, rows, drop),),
                lambda mask: plain.down(mask, p), passes + small, flops,
            )  # fmt: skip
            yield KernelCase(
                "routed_down_bwd", tag, lambda: (routed_down_bwd(t, x, down[0].dtype, rows, drop),),
                lambda mask: plain.down_bwd(mask, p), passes + small, flops,
            )  # fmt: skip
            yield KernelCase(
                "routed_up", tag, lambda: (routed_up(base, t, up, rows, transform, drop),),
                lambda mask: plain.up(mask, p), 2 * passes + small, flops,
            )  # fmt: skip
            yield KernelCase(
                "routed_up_bwd", tag,
                lambda: routed_up_bwd(x, t, up.up_weights, rows, transform, drop, needs)[:2],
                lambda mask: plain.up_bwd(mask, p), passes + 2 * small, 2 * flops,
            )  # fmt: skip
