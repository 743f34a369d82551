"""The feed-forward block of a layer. One is accepted only where its formula, computed again from
what its projections gave, is what its last projection read: act(in(x)), or act(gate(x)) * in(x)."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from transformers.pytorch_utils import Conv1D

from pelt_fast.layouts.discovery import spelled_out
from pelt_fast.layouts.layout import FFNLayout
from pelt_fast.layouts.lookup import find

from .attentions import below
from .graph import Graph
from .trace import Call

# what a block's code may call itself
_SPELLED = tuple((None, f) for f in (F.silu, F.gelu, F.relu, functools.partial(
    F.gelu, approximate="tanh"), lambda x: F.relu(x).square()))  # fmt: skip
# a call of a dropout draws, one of a batch norm counts; the bases are those of all their kinds
_NO_ACTIVATION = (nn.Identity, _DropoutNd, nn.Linear, nn.Embedding, Conv1D, nn.LayerNorm, _NormBase)


@dataclass(eq=False)
class Block:
    """The calls of a block: ``gate`` is None without a gate. ``halves``: one matrix holds gate and
    in, and which half is which."""

    gate: Call | None
    into: Call
    out: Call
    activation: str | None  # a path from the base; None where the code of the block spells it
    halves: str = ""

    def paths(self, layer: str) -> tuple[str, str, str | None]:
        """in, out and gate as a layer's layout names them."""
        into, out = (_named(call, layer) for call in (self.into, self.out))
        if self.halves:
            gate, up = self.halves
            return f"{into.rstrip(':')}:{up}/2", out, f"{into.rstrip(':')}:{gate}/2"
        return into, out, None if self.gate is None else _named(self.gate, layer)


def _named(call: Call, layer: str) -> str:
    return below(call.path, layer) + (":" if isinstance(call.module, Conv1D) else "")


def blocks(base: nn.Module, layer: str, graph: Graph, taken: set[str]) -> list[Block]:
    """The blocks of one layer, whose pieces are all called equally often. ``taken`` are the paths
    of linear layers that are no part of one."""
    times = Counter(call.path for call in graph.linears)
    inside = [call for call in graph.linears
              if call.path.startswith(layer + ".") and call.path not in taken]  # fmt: skip
    found: dict[tuple, Block] = {}  # by their paths: layers may share a block
    for out in inside:
        block = _block(base, layer, out, graph.nearest(out.input), inside)
        if block is not None and times[block.into.path] == times[out.path]:
            found.setdefault(block.paths(layer), block)
    return list(found.values())


def _block(
    base: nn.Module, layer: str, out: Call, before: list[Call], inside: list[Call]
) -> Block | None:
    """The block whose last projection is ``out``, or None."""
    if not 1 <= len(before) <= 2 or any(call not in inside for call in before):
        return None
    if len(before) == 2 and not _same_values(*(call.input for call in before)):
        return None
    read = out.input.detach()
    for path, activation in (*_activations(base, layer, before[0].path), *_SPELLED):
        for gate, into, halves in _orders(before):
            u, g = _values(gate, into, halves)
            if u.shape == read.shape and _is(activation, g, u, read):
                return Block(gate if gate is not into else None, into, out, path, halves)
    return None


def _orders(before: list[Call]) -> Iterator[tuple[Call | None, Call, str]]:
    if len(before) == 2:
        one, two = before
        yield one, two, ""
        yield two, one, ""
    else:
        yield None, before[0], ""
        yield before[0], before[0], "01"
        yield before[0], before[0], "10"


def _values(gate: Call | None, into: Call, halves: str) -> tuple[Tensor, Tensor | None]:
    """What in and gate gave."""
    u = into.output.detach()
    if not halves:
        return u, None if gate is None else gate.output.detach()
    if u.shape[-1] % 2:
        return u, u
    parts = u.chunk(2, -1)
    return parts[int(halves[1])], parts[int(halves[0])]


@torch.no_grad()
def _is(activation: Callable, gate: Tensor | None, u: Tensor, read: Tensor) -> bool:
    """Whether the formula gives what the last projection read, bit for bit."""
    try:
        made = activation(u) if gate is None else activation(gate) * u
    except Exception:  # anything callable is tried: it may take other arguments
        return False
    return isinstance(made, Tensor) and torch.equal(made, read)


def _activations(base: nn.Module, layer: str, path: str) -> Iterator[tuple[str, Callable]]:
    """What may be the activation: the callables that the owners of a projection hold, the nearest
    owner first."""
    owner = path.rpartition(".")[0]
    while owner.startswith(layer):
        module = find(base, owner)
        for name, value in (*module._modules.items(), *vars(module).items()):
            if _may_activate(name, value):
                yield f"{owner}.{name}", value
        for name, child in module._modules.items():
            if child is not None and not path.startswith(f"{owner}.{name}."):
                yield from _held_by(child, f"{owner}.{name}")
        owner = owner.rpartition(".")[0]


def _held_by(module: nn.Module, path: str) -> Iterator[tuple[str, Callable]]:
    """The activation that a part beside the projection holds (BERT's intermediate)."""
    for name, value in (*module._modules.items(), *vars(module).items()):
        if _may_activate(name, value) and "act" in name:
            yield f"{path}.{name}", value


def _may_activate(name: str, value) -> bool:
    if isinstance(value, nn.Module):
        return not isinstance(value, _NO_ACTIVATION) and not list(value.children())
    # a forward of the module's own stands for the module
    own = name == "forward" or name.startswith("_")
    return callable(value) and not isinstance(value, type) and not own


def layout_of(
    base: nn.Module, layer: str, block: Block, calls: list[Call], attentions: tuple[str, ...]
) -> FFNLayout | str:
    """The block as a layout describes it, or why none can. ``attentions`` are the paths of the
    layer's attention modules."""
    into, out, gate = block.paths(layer)
    entry = _container(base, layer, block, calls)
    if entry is None and gate is not None:
        return f"the layer's own code is the gated block of {into}"
    if entry is None and block.activation is None:
        return f"the layer's own code is the block of {into}, with an activation that it spells out"
    activation = None if block.activation is None else below(block.activation, layer)
    made = FFNLayout(into if entry is None else below(entry, layer), into, out, activation, "",
                     gate)  # fmt: skip
    own = find(base, layer)
    if entry is None and isinstance(getattr(own, "dropout", None), float):
        made = replace(made, **spelled_out(own, attentions))
    else:
        made = replace(made, **_dropouts(layer, block, calls, entry))
    return replace(made, **_norms(layer, block, calls, entry))


def _container(base: nn.Module, layer: str, block: Block, calls: list[Call]) -> str | None:
    """The smallest module that is the whole block: it holds the pieces, reads what they read and
    returns what they return."""
    path = block.into.path.rpartition(".")[0]
    while len(path) > len(layer):
        ran = [call for call in calls if call.path == path]
        holds = all(piece is None or piece.path.startswith(path + ".")
                    for piece in (block.gate, block.into, block.out))  # fmt: skip
        if holds and ran and _reads_and_returns(ran[0], block):
            return path
        path = path.rpartition(".")[0]
    return None


def _reads_and_returns(call: Call, block: Block) -> bool:
    reads = _same_values(call.input, block.into.input)
    return reads and _same_values(call.output, block.out.output)


def _dropouts(layer: str, block: Block, calls: list[Call], entry: str | None) -> dict[str, str]:
    """The block's dropouts that are modules, by the order of their calls."""
    place, end = entry or layer, block.out.ended
    last = min((c.began for c in calls if c.is_linear and c.began > end), default=10**9)
    named = {}
    for call in calls:
        if not isinstance(call.module, nn.Dropout) or not call.path.startswith(place + "."):
            continue
        if block.into.ended < call.began < block.out.began:
            named["activation_dropout"] = below(call.path, layer)
        elif end < call.began < last and _same_values(call.input, block.out.output):
            named["output_dropout"] = below(call.path, layer)
    return named


def _norms(layer: str, block: Block, calls: list[Call], entry: str | None) -> dict[str, str]:
    """The norm that reads the block's output plus its input, or else the one in front of it."""
    norms = [c for c in calls if c.path.startswith(layer + ".") and "norm" in
             (type(c.module).__name__ + c.path).lower() and c.input is not None
             and c.output is not None]  # fmt: skip
    if block.out.output.shape == block.into.input.shape:
        total = block.out.output + block.into.input
        for call in norms:
            if call.began > block.out.ended and _same_values(call.input, total):
                return {"norm_after": below(call.path, layer)}
    for call in norms:
        if call.ended < block.into.began and _same_values(call.output, block.into.input):
            return {"norm": below(call.path, layer)}
    return {}


def _same_values(one: Tensor | None, two: Tensor | None) -> bool:
    return one is not None and two is not None and one.shape == two.shape and torch.equal(one, two)
