"""The widened FFN's cases: a feed-forward block with a parallel bottleneck."""

import torch
from torch.nn import functional as F

from pelt_fast import functional

from .case import Case
from .expressions import (
    BOTTLENECK,
    bottleneck_update,
    bottleneck_weights,
    drop,
    linear,
    seeds_for,
)


def ffn_case(
    m: int, k: int, n: int, r: int, p: float, gated: bool, separate: bool = False,
    beside: bool = False,
) -> Case:  # fmt: skip
    """A feed-forward block K -> 2K + 3 -> N with a bottleneck of R. ``separate``: the bottleneck
    reads another input than the block. ``beside``: the layers compute their own products."""
    inner = 2 * k + 3
    frozen = ("in_weight", "in_bias", "out_weight", "out_bias", "gate_weight", "gate_bias")

    def make():
        t = dict(x=torch.randn(m, k), in_weight=torch.randn(inner, k) / k**0.5,
                 in_bias=torch.randn(inner), out_weight=torch.randn(n, inner) / inner**0.5,
                 out_bias=torch.randn(n), **bottleneck_weights(k, n, r))  # fmt: skip
        if separate:
            t |= dict(adapter_x=torch.randn(m, k))
        if gated:
            t |= dict(gate_weight=torch.randn(inner, k) / k**0.5, gate_bias=torch.randn(inner))
        return t

    def call_beside(t):
        small = {name: t[name] for name in (*BOTTLENECK[:4], "adapter_x") if name in t}
        gate = linear(t, "gate_weight", "gate_bias") if gated else None
        return functional.ffn_adapter_beside(
            t["x"], linear(t, "in_weight", "in_bias"), linear(t, "out_weight", "out_bias"), **small,
            gate_layer=gate, scale=2.0, dropout_p=p, activation_dropout_p=p, output_dropout_p=p,
        )  # fmt: skip

    def call(t):
        parts = [t["gate_weight"]] if gated else []
        parts += [t["in_weight"], t["down_weight"].detach().to(t["x"].dtype)]
        packed = torch.cat([*parts, parts[0].new_zeros(11, k)])
        up = 2.0 * t["up_weight"].detach().to(t["x"].dtype)
        packed_out = torch.cat([t["out_weight"], up, up.new_zeros(n, 5)], 1)
        return functional.ffn_parallel_adapter(
            **t, packed=None if separate else packed, packed_out=packed_out, scale=2.0, dropout_p=p,
            activation_dropout_p=p, output_dropout_p=p,
        )  # fmt: skip

    def expression(t):
        x, seeds = t["x"], seeds_for(t["x"], p, 3)
        z = F.linear(x, t["in_weight"], t["in_bias"])
        h = F.gelu(F.linear(x, t["gate_weight"], t["gate_bias"])) * z if gated else F.gelu(z)
        y = F.linear(drop(h, p, seeds, 1), t["out_weight"], t["out_bias"])
        read = t.get("adapter_x", x)
        update = 2.0 * bottleneck_update(read, t, lambda h: drop(h, p, seeds, 0))
        return drop(y, p, seeds, 2) + update

    name = f"{'gated' if gated else 'plain'}{' separate' if separate else ''} p={p}"
    if beside:
        return Case("beside", f"ffn {name}", make, call_beside, expression, BOTTLENECK, frozen)
    return Case("ffn", name, make, call, expression, BOTTLENECK, frozen)
