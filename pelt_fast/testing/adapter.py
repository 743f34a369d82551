"""The bottleneck adapter's cases: parallel and sequential, with a LayerNorm or without."""

import torch
from torch.nn import functional as F

from pelt_fast import functional

from .case import Case
from .expressions import BOTTLENECK, bottleneck_update, bottleneck_weights, drop, seeds_for


def adapter_case(m: int, k: int, n: int, r: int, p: float, layer_norm: str, parallel: bool) -> Case:
    """A bottleneck K -> R -> N beside a layer, or K -> R -> K behind one, dropout p."""
    n = n if parallel else k
    width = k if layer_norm == "in" else n

    def make():
        t = dict(x=torch.randn(m, k), **bottleneck_weights(k, n, r))
        if parallel:
            t["base_out"] = torch.randn(m, n)
        if layer_norm != "none":
            t |= dict(norm_weight=torch.rand(width) + 0.5, norm_bias=torch.randn(width))
        return t

    def call(t):
        settings = dict(scale=1.5, layer_norm=layer_norm, dropout_p=p)
        if parallel:
            return functional.parallel_adapter(**t, **settings)
        h = t["x"]
        return functional.sequential_adapter(
            h, **{name: value for name, value in t.items() if name != "x"}, **settings
        )

    def expression(t):
        x, seeds = t["x"], seeds_for(t["x"], p, 1)

        def norm(z):
            weights = (t[name].to(z.dtype) for name in ("norm_weight", "norm_bias"))
            return F.layer_norm(z, (width,), *weights)

        u = norm(x) if layer_norm == "in" else x
        z = 1.5 * bottleneck_update(u, t, lambda h: drop(h, p, seeds, 0))
        return (t["base_out"] if parallel else x) + (norm(z) if layer_norm == "out" else z)

    kind = "parallel" if parallel else "sequential"
    return Case("adapter", f"{kind} norm={layer_norm} p={p}", make, call, expression, BOTTLENECK)
