"""Walks of the autograd graph: which linear layers a tensor comes from, and which of their rows."""

import torch
from torch import Tensor

from .trace import Call, Trace
from .walk import back


class Graph:
    """The graph of one forward, with the calls of linear layers as its stations."""

    def __init__(self, trace: Trace):
        self.linears = [call for call in trace.calls if call.is_linear]
        self._by_node: dict[object, list[Call]] = {}
        for call in self.linears:
            self._by_node.setdefault(call.node, []).append(call)

    def nearest(self, tensor: Tensor) -> list[Call]:
        """The first linear layers that are met on every way back from a tensor."""
        found: list[Call] = []
        for node in back(tensor.grad_fn, self._by_node):
            found += self._by_node.get(node, [])[-1:]
        return sorted(found, key=lambda call: call.ended)

    def comes_from(self, tensor: Tensor, node: object) -> bool:
        """Whether a tensor comes from ``node`` with no linear layer between."""
        stations = {**self._by_node, node: []}
        return any(met is node for met in back(tensor.grad_fn, stations))


def used_rows(tensor: Tensor, linear: Call) -> str:
    """Which outputs of a linear layer a tensor is made of: "" for all of them, else "a-b" or
    "a-b%p". ValueError for any other pattern."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(tensor.shape, generator=generator).to(tensor)
    (gradient,) = torch.autograd.grad(tensor, linear.output, weights, retain_graph=True)
    used = (gradient != 0).flatten(0, -2).any(0)
    return _named(used.nonzero().flatten().tolist(), len(used))


def _named(rows: list[int], count: int) -> str:
    if len(rows) == count:
        return ""
    if not rows:
        raise ValueError("no output of the layer reaches it")
    first, blocks = rows[0], [[rows[0], rows[0] + 1]]
    for row in rows[1:]:
        if row == blocks[-1][1]:
            blocks[-1][1] += 1
        else:
            blocks.append([row, row + 1])
    size = blocks[0][1] - first
    if len(blocks) == 1:
        return f"{first}-{first + size}"
    period = blocks[1][0] - first
    expected = [[first + i * period, first + i * period + size] for i in range(len(blocks))]
    if blocks != expected or period * len(blocks) != count:
        raise ValueError("its rows in the shared matrix follow no pattern")
    return f"{first}-{first + size}%{period}"
