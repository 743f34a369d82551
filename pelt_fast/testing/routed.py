"""The cases of many methods in one batch: each row with its own bottleneck, or none."""

import torch

from pelt_fast import functional

from .case import Case, Tensors
from .expressions import bottleneck_update, bottleneck_weights, drop, seeds_for

SCALES = [1.5, -0.5, 2.0]
HALVES = ("down_weight", "down_bias", "up_weight", "up_bias")


def routed_case(m: int, k: int, n: int, r: int, p: float, adapter: bool) -> Case:
    """Three methods of ranks R, 1 and 3 R and rows of none, all mixed. LoRA with the dropout p on
    x, or ``adapter``: biases, ReLU, the dropout on the bottleneck."""
    ranks = [r, 1, 3 * r]
    names = HALVES if adapter else HALVES[::2]

    def make():
        t = dict(x=torch.randn(m, k), base=torch.randn(m, n), routes=torch.randint(-1, 3, (m,)))
        for i, rank in enumerate(ranks):
            small = bottleneck_weights(k, n, rank)
            t |= {f"{name}{i}": small[name] for name in names}
        return t

    def call(t):
        plural = {"down_bias": "down_biases", "up_bias": "up_biases"}
        lists = {
            plural.get(name, f"{name}s"): [t[f"{name}{i}"] for i in range(3)] for name in names
        }
        settings = dict(activation="relu", dropout_p=p) if adapter else dict(input_dropout_p=p)
        return functional.routed_beside(
            t["x"], t["base"], t["routes"], **lists, scales=SCALES, **settings
        )

    def expression(t):
        seeds, y = seeds_for(t["x"], p, 3), t["base"]
        for i, scale in enumerate(SCALES):
            rows = (t["routes"] == i).nonzero()[:, 0]
            y = y.index_add(0, rows, scale * _alone(t, i, rows, p, seeds))
        return y

    def _alone(t: Tensors, i: int, rows, p, seeds):
        x, small = t["x"][rows], {name: t[f"{name}{i}"] for name in names}
        if adapter:
            return bottleneck_update(x, small, lambda h: drop(h, p, seeds, i))
        down, up = (small[name].to(x.dtype) for name in names)
        return drop(x, p, seeds, i) @ down.t() @ up.t()

    trainable = tuple(f"{name}{i}" for name in names for i in range(3))
    kind = "adapters" if adapter else "lora"
    return Case("routed", f"{kind} p={p}", make, call, expression, trainable)
