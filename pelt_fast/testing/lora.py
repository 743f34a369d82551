"""LoRA's cases: y = x Wᵀ + b + s (drop(x) Aᵀ) Bᵀ."""

import torch
from torch.nn import functional as F

from pelt_fast import functional

from .case import Case
from .expressions import drop, linear, seeds_for


def lora_case(m: int, k: int, n: int, r: int, p: float, beside: bool = False) -> Case:
    """LoRA on a linear layer (M, K) -> (M, N), rank R, dropout p. ``beside``: the layer computes
    its own product."""

    def make():
        return dict(x=torch.randn(m, k), weight=torch.randn(n, k) / k**0.5, bias=torch.randn(n),
                    lora_a=torch.randn(r, k) / k**0.5, lora_b=torch.randn(n, r))  # fmt: skip

    def call(t):
        if not beside:
            return functional.lora_linear(**t, scale=2.0, dropout_p=p)
        factors = t["lora_a"], t["lora_b"]
        layer = linear(t, "weight", "bias")
        return functional.lora_beside(t["x"], layer, *factors, scale=2.0, dropout_p=p)

    def expression(t):
        x, low = t["x"], t["x"].dtype
        dropped = drop(x, p, seeds_for(x, p, 1), 0)
        update = F.linear(F.linear(dropped, t["lora_a"].to(low)), t["lora_b"].to(low))
        return F.linear(x, t["weight"], t["bias"]) + 2.0 * update

    op, name = ("beside", f"lora p={p}") if beside else ("lora", f"p={p}")
    return Case(op, name, make, call, expression, ("lora_a", "lora_b"), ("weight", "bias"))
