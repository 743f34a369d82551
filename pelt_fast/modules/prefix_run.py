"""The prefix of one forward of a stack: who reads which, in threads and under checkpointing."""

import torch
from torch import Tensor, nn

from .per_thread import PerThread


class SharedPrefixGradient(torch.autograd.Function):
    """One layer's keys and values in the backward of a reentrant checkpoint, which is a backward of
    its own for each layer: their gradient goes on into the graph that all layers share, and leaves
    it standing for the next one."""

    @staticmethod
    def forward(ctx, values: list[Tensor], index: int, anchor: Tensor) -> tuple[Tensor, Tensor]:
        # in a list: not an input of the graph. A nested backward must not walk into it, and free it
        ctx.values, ctx.index = values, index
        return values[0][index, 0].clone(), values[0][index, 1].clone()

    @staticmethod
    def backward(ctx, d_keys: Tensor, d_values: Tensor):
        with torch.enable_grad():
            both = ctx.values[0][ctx.index]
        torch.autograd.backward(both, torch.stack([d_keys, d_values]), retain_graph=True)
        return None, None, None


class PrefixRun:
    """What the layers of one forward read: ``values`` (L, 2, Hkv, P, D), or None where the prefix
    does not act in it."""

    def __init__(self, values: Tensor | None):
        self.values = values
        self.with_grad = torch.is_grad_enabled()  # as the forward began
        self.reentrant = False  # and its layers run without it
        self._layers: tuple[bool, list[tuple[Tensor, Tensor]]] | None = None

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D) of one layer."""
        values = self.values
        if not torch.compiler.is_compiling():
            if self.with_grad and not torch.is_grad_enabled():
                self.reentrant = True  # the layer runs again in backward, with autograd
            elif self.reentrant and values.requires_grad:
                # what makes autograd come by: a part of a layer's graph, not of the prefix's
                anchor = torch.empty(0, device=values.device, requires_grad=True)
                return SharedPrefixGradient.apply([values], index, anchor)
            return self._all_layers()[index]
        return values[index, 0], values[index, 1]

    def _all_layers(self) -> list[tuple[Tensor, Tensor]]:
        """Every layer's two, taken apart at once: their gradients meet in one stack, where each
        slice of its own would have a zero tensor of all layers, and an addition."""
        with_grad = torch.is_grad_enabled()
        if self._layers is None or self._layers[0] != with_grad:
            parts = self.values.flatten(0, 1).unbind()
            self._layers = with_grad, list(zip(parts[::2], parts[1::2], strict=True))
        return self._layers[1]


class PrefixRuns:
    """The forward of the stack that each thread is in.

    A checkpoint runs a layer again in backward, when no forward of the stack is under way, and on
    CUDA in a thread of autograd's own. What it reads there is the last forward with autograd on:
    the graph is the one that forward's losses hang on, and the values are those of any forward of
    the same weights. A checkpointed layer reads its own weights again as well, so that two weight
    sets in one backward are beyond checkpointing in any module. One run is kept, no more.
    """

    def __init__(self):
        self._now = PerThread()
        self._last: PrefixRun | None = None

    def begin(self, values: Tensor | None) -> None:
        """Before the stack's forward."""
        run = PrefixRun(values)
        if torch.compiler.is_compiling():
            self._now.traced = run
        else:
            self._now.local.value = run
        if run.with_grad and not torch.compiler.is_compiling():
            self._last = run

    def end(self, *_) -> None:
        """After it (a forward hook of the stack)."""
        if torch.compiler.is_compiling():
            self._now.traced = None
        else:
            self._now.local.value = None

    def now(self) -> PrefixRun | None:
        """The forward to read from; None outside of one and of its backward."""
        if torch.compiler.is_compiling():
            return self._now.traced
        run = self._now.local.value
        if run is None and torch._C._current_graph_task_id() != -1:  # inside of a backward
            return self._last
        return run

    def __reduce__(self):
        return type(self), ()


class AttentionSlice:
    """What the attention function finds on a module: called with the scale of the scores it gives
    prefix_k and prefix_v (Hkv, P, D)."""

    form, composition = "softmax", "gated"
    on = True  # whether it is at work
    checked: tuple | None = None  # the kind of inputs that the public function took last


class PrefixSlice(AttentionSlice):
    """One attention's layer of a bank; the attention function finds it on the module.

    Args:
        bank: what makes the keys and values of the whole stack.
        index: the layer's.
        composition: "gated" or "add" (``functional.prefix_attention``).
    """

    def __init__(self, bank: nn.Module, index: int, composition: str):
        self.bank, self.index, self.composition = bank, index, composition

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D), whatever the scale of their scores."""
        run = self.bank.runs.now()
        return (PrefixRun(self.bank()) if run is None else run).layer(self.index)
