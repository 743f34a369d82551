"""The prefix of one forward of a stack, for layers in several threads and under checkpointing."""

import weakref
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from .checkpointed import reentrant_nodes
from .per_thread import PerThread
from .switch import ALWAYS_ON


class SharedPrefixGradient(torch.autograd.Function):
    """One layer's keys and values in the backward of a reentrant checkpoint. That checkpoint runs a
    separate backward for each layer. This function sends the layer's gradient into the graph of the
    prefix, which all layers share, and keeps that graph for the next layer."""

    @staticmethod
    def forward(ctx, values: list[Tensor], index: int, anchor: Tensor) -> tuple[Tensor, Tensor]:
        # in a list, so that it is no input of the graph: a nested backward would enter and free it
        ctx.values, ctx.index = values, index
        return values[0][index, 0].clone(), values[0][index, 1].clone()

    @staticmethod
    def backward(ctx, d_keys: Tensor, d_values: Tensor):
        with torch.enable_grad():
            both = ctx.values[0][ctx.index]
        torch.autograd.backward(both, torch.stack([d_keys, d_values]), retain_graph=True)
        return None, None, None


class PrefixRun:
    """The prefix that the layers of one forward read: ``values`` (L, 2, Hkv, P, D), or None if the
    prefix does not act in this forward.

    ``again`` is a second run of the same values, for the layers that a checkpoint runs again. Nodes
    of the forward's graph hold it, so that it lives as long as they do. Each of them leads to the
    values, and the values to none of them. The layers that this run has split do lead to them:
    ``again`` has none of these, because a circle through nodes would never be freed.
    """

    again: "PrefixRun | None" = None

    def __init__(self, values: Tensor | None):
        self.values = values
        self.with_grad = torch.is_grad_enabled()  # when the forward began
        self.reentrant = False  # and its layers run without autograd
        # whether no node holds what a layer needs in backward
        self.without_node = values is None or not values.requires_grad
        self._layers: tuple[bool, list[tuple[Tensor, Tensor]]] | None = None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D) of one layer."""
        values = self.values
        if not torch.compiler.is_compiling():
            if self.with_grad and not torch.is_grad_enabled():
                self._begin_reentry()
            elif self.reentrant and values.requires_grad:
                # an input that requires a gradient, so that autograd calls the function's backward
                anchor = torch.empty(0, device=values.device, requires_grad=True)
                return SharedPrefixGradient.apply([values], index, anchor)
            return self._all_layers()[index]
        return values[index, 0], values[index, 1]

    def _all_layers(self) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of every layer, split in one step. Their gradients are then stacked
        once. Separate slices would each make a zero tensor of all layers and an addition."""
        with_grad = torch.is_grad_enabled()
        if self._layers is None or self._layers[0] != with_grad:
            parts = self.values.flatten(0, 1).unbind()
            self._layers = with_grad, list(zip(parts[::2], parts[1::2], strict=True))
            if parts[0].grad_fn is not None:
                self._give_to([parts[0].grad_fn])
        return self._layers[1]

    def _begin_reentry(self) -> None:
        """The layer runs without autograd now, and again in backward with autograd."""
        self.reentrant = True
        if self.again is not None:
            self.again.reentrant = True
            nodes = list(reentrant_nodes())
            self.without_node |= not nodes  # a checkpoint that is not torch's
            self._give_to(nodes)

    def _give_to(self, nodes: Iterable[Node]) -> None:
        """Let ``nodes`` of the forward's graph hold what their layers read in backward."""
        if self.again is not None:
            for node in nodes:
                node.metadata[self.again] = None


class PrefixRuns:
    """The current forward of the stack in each thread.

    A checkpoint runs a layer again in backward: outside any forward of the stack, and on CUDA in
    one of autograd's own threads. There it reads the last forward that ran with autograd and whose
    graph lives. That forward's graph leads to the loss, and every forward with the same weights has
    the same values. A checkpointed layer also reads its own weights again, so no module supports
    two sets of weights in one backward under checkpointing.

    Between steps nothing here holds a graph. A graph that lived into the next step would keep the
    nodes that add up the gradients, and a CUDA graph could not capture that step on its own stream.
    """

    def __init__(self):
        self._now = PerThread()
        self._living: list[weakref.ref[PrefixRun]] = []  # of forwards whose graph lives, in order
        self._held: PrefixRun | None = None  # of the last forward, if no node of its graph holds it

    def begin(self, values: Tensor | None) -> None:
        """Called before the stack's forward."""
        run = PrefixRun(values)
        if torch.compiler.is_compiling():
            self._now.traced = run
            return
        self._now.local.value = run
        if run.with_grad:
            run.again = PrefixRun(values)
            self._living.append(weakref.ref(run.again, self._living.remove))

    def end(self, *_) -> None:
        """Called after the stack's forward, after an error too (a forward hook of the stack)."""
        if torch.compiler.is_compiling():
            self._now.traced = None
            return
        run = self._now.take()
        if run is not None and run.again is not None:
            self._held = run.again if run.without_node else None

    def now(self) -> PrefixRun | None:
        """The forward to read from; None outside any forward and its backward."""
        if torch.compiler.is_compiling():
            return self._now.traced
        run = self._now.local.value
        if run is None and torch._C._current_graph_task_id() != -1:  # inside a backward
            return self._last()
        return run

    def _last(self) -> PrefixRun | None:
        """The last forward with autograd whose graph lives."""
        alive = (reference() for reference in reversed(self._living))
        return next((run for run in alive if run is not None), None)

    def __reduce__(self):
        return type(self), ()


class AttentionSlice:
    """The object that the attention function finds on a module. A call with the scale of the scores
    returns prefix_k and prefix_v (Hkv, P, D)."""

    form, composition = "softmax", "gated"
    checked: tuple | None = None  # the kind of the last inputs of the public function
    on = True  # whether it acts, unless the switch is off
    switched: Any = SimpleNamespace(switch=ALWAYS_ON)  # the module that has the switch


class PrefixSlice(AttentionSlice):
    """The part of a bank for one attention module; the attention function finds it on the module.

    Args:
        bank: makes the keys and values of the whole stack.
        index: the index of the layer.
        composition: "gated" or "add" (``functional.prefix_attention``).
    """

    def __init__(self, bank: nn.Module, index: int, composition: str):
        self.bank, self.index, self.composition = bank, index, composition
        self.switched = bank

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D); they do not depend on the scale of the scores."""
        run = self.bank.runs.now()
        return (PrefixRun(self.bank()) if run is None else run).layer(self.index)
