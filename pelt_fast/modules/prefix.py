"""Prefix tuning: the bank of trainable keys and values of one stack, and each layer's slice.

The bank's reparameterisation (an embedding, Linear, Tanh, Linear; PAPER 3.4) runs once per
forward of the stack, never per batch row, and is cached while nothing changes in evaluation.
"""

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification


class Rejoined(torch.autograd.Function):
    """One layer's keys and values in the backward of a reentrant checkpoint, which is a backward of
    its own for each layer: their gradient goes on into the graph that all layers share, and leaves
    it standing for the next one."""

    @staticmethod
    def forward(ctx, bank: "PrefixBank", index: int, anchor: Tensor) -> tuple[Tensor, Tensor]:
        # not an input of the graph: a nested backward must not walk into it, and free it
        ctx.current, ctx.index = bank.current, index
        return bank.current[index, 0].clone(), bank.current[index, 1].clone()

    @staticmethod
    def backward(ctx, d_keys: Tensor, d_values: Tensor):
        with torch.enable_grad():
            both = ctx.current[ctx.index]
        torch.autograd.backward(both, torch.stack([d_keys, d_values]), retain_graph=True)
        return None, None, None


class PrefixBank(nn.Module):
    """Keys and values (L, 2, Hkv, P, D) of one kind of attention in one stack.

    Reparameterised: embedding (P, width), Linear(width, mlp_dim), Tanh, Linear(mlp_dim,
    L * 2 * Hkv * D), with PyTorch's default init. Direct: ``prefix``, normal 0.02.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, width: int,
                 modification: Modification, device, dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.shape = (layers, 2, heads, modification.size, head_dim)
        place = dict(device=device, dtype=dtype)
        self.embedding = self.mlp = None
        if modification.reparameterization == "mlp":
            self.embedding = nn.Parameter(torch.empty(modification.size, width, **place))
            nn.init.normal_(self.embedding)
            outputs = layers * 2 * heads * head_dim
            self.mlp = nn.Sequential(
                nn.Linear(width, modification.mlp_dim, **place),
                nn.Tanh(),
                nn.Linear(modification.mlp_dim, outputs, **place),
            )
            self.register_parameter("prefix", None)
        else:
            self.prefix = nn.Parameter(torch.empty(self.shape, **place))
            nn.init.normal_(self.prefix, std=0.02)
        self.current: Tensor | None = None
        self._current_of: tuple | None = None
        self._with_grad = False  # whether this forward of the stack began with autograd on
        self._reentrant = False  # and its layers run without it

    def forward(self) -> Tensor:
        """The keys and values of every layer (L, 2, Hkv, P, D)."""
        if self.prefix is not None:
            return self.prefix
        layers, two, heads, size, head_dim = self.shape
        flat = self.mlp(self.embedding)  # (P, L * 2 * Hkv * D)
        return flat.view(size, layers, two, heads, head_dim).permute(1, 2, 3, 0, 4).contiguous()

    def before_stack(self, *_) -> None:
        """Forward pre-hook of the stack: make the prefix of this forward."""
        self._with_grad, self._reentrant = torch.is_grad_enabled(), False
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            self.current, self._current_of = self(), None
            return
        state = tuple((p.data_ptr(), p._version) for p in self.parameters())
        if self.current is None or self._current_of != state:
            self.current, self._current_of = self(), state

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D) of one layer, from this forward's run."""
        if self.current is None:
            self.current = self()
        if not torch.compiler.is_compiling():
            if self._with_grad and not torch.is_grad_enabled():
                self._reentrant = True  # the layer runs again in backward, with autograd
            elif self._reentrant and self.current.requires_grad:
                return Rejoined.apply(self, index, self._anchor())
        return self.current[index, 0], self.current[index, 1]

    def _anchor(self) -> Tensor:
        """What makes autograd come by: a part of a layer's graph, not of the prefix's."""
        return torch.empty(0, device=self.current.device, requires_grad=True)

    @torch.no_grad()
    def fold(self, values: Tensor | None = None) -> None:
        """Drop the reparameterisation; train keys and values directly from here (``values``, or
        the ones it gives now)."""
        like = next(self.parameters())
        if values is None:
            values = self().detach()
        self.embedding = self.mlp = self.current = None
        self.prefix = nn.Parameter(values.to(like.device, like.dtype).clone())

    def _apply(self, fn, recurse=True):
        self.current = None
        return super()._apply(fn, recurse)

    def __getstate__(self):
        # the current prefix may hang on a graph: a copy or a pickle makes its own
        return {**self.__dict__, "current": None, "_current_of": None}

    def extra_repr(self) -> str:
        layers, _, heads, size, head_dim = self.shape
        return f"layers={layers}, heads={heads}, length={size}, head_dim={head_dim}"


class PrefixSlice:
    """One attention's place in a bank; the attention function finds it on the module."""

    form, on = "softmax", True

    def __init__(self, bank: PrefixBank, index: int, composition: str):
        self.bank, self.index, self.composition = bank, index, composition

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, P, D), whatever the scale of their scores."""
        return self.bank.layer(self.index)
