"""Prefix tuning: the bank of trainable keys and values of one stack of layers.

The bank's reparameterisation (an embedding, Linear, Tanh, Linear: docs/maths.md#the-prefix-mlp)
runs once per forward of the stack, never per batch row. While a thread generates, it runs once for
all steps.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification

from .per_thread import PerThread
from .prefix_run import PrefixRuns
from .switch import ALWAYS_ON, Switch


class PrefixBank(nn.Module):
    """Keys and values (L, 2, Hkv, P, D) of one kind of attention in one stack.

    Reparameterised: embedding (P, width), Linear(width, mlp_dim), Tanh, Linear(mlp_dim,
    L * 2 * Hkv * D), with PyTorch's default init. Direct: ``prefix``, normal 0.02.
    """

    switch: Switch = ALWAYS_ON

    def __init__(self, layers: int, heads: int, head_dim: int, width: int,
                 modification: Modification, device, dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.shape = (layers, 2, heads, modification.size, head_dim)
        factory = dict(device=device, dtype=dtype)
        self.embedding = self.mlp = None
        if modification.reparameterization == "mlp":
            self.embedding = nn.Parameter(torch.empty(modification.size, width, **factory))
            nn.init.normal_(self.embedding)
            outputs = layers * 2 * heads * head_dim
            self.mlp = nn.Sequential(
                nn.Linear(width, modification.mlp_dim, **factory),
                nn.Tanh(),
                nn.Linear(modification.mlp_dim, outputs, **factory),
            )
            self.register_parameter("prefix", None)
        else:
            self.prefix = nn.Parameter(torch.empty(self.shape, **factory))
            nn.init.normal_(self.prefix, std=0.02)
        self.runs, self._generation = PrefixRuns(), PerThread()

    def forward(self) -> Tensor:
        """The keys and values of every layer (L, 2, Hkv, P, D)."""
        if self.prefix is not None:
            return self.prefix
        layers, two, heads, size, head_dim = self.shape
        flat = self.mlp(self.embedding)  # (P, L * 2 * Hkv * D)
        return flat.view(size, layers, two, heads, head_dim).permute(1, 2, 3, 0, 4).contiguous()

    def before_stack(self, *_) -> None:
        """Forward pre-hook of the stack: compute the prefix of this forward."""
        if not (self.switch.any_block and self.switch.is_off()):
            self.runs.begin(self._values())

    def _values(self) -> Tensor:
        if torch.compiler.is_compiling() or self.training or torch.is_grad_enabled():
            return self()
        made = self._generation.local.value
        if made is None:
            return self()
        if not made:
            made.append(self())
        return made[0]

    @contextlib.contextmanager
    def made_once(self) -> Iterator[None]:
        """Context: this thread's forwards without autograd compute the prefix once."""
        before = self._generation.get()
        self._generation.put([])
        try:
            yield
        finally:
            self._generation.put(before)

    @torch.no_grad()
    def fold(self, values: Tensor | None = None) -> None:
        """Drop the reparameterisation and train keys and values directly from now on. They start at
        ``values``, or at the current output of the reparameterisation."""
        like = next(self.parameters())
        if values is None:
            values = self().detach()
        self.embedding = self.mlp = None
        self.prefix = nn.Parameter(values.to(like.device, like.dtype).clone())

    def extra_repr(self) -> str:
        layers, _, heads, size, head_dim = self.shape
        return f"layers={layers}, heads={heads}, length={size}, head_dim={head_dim}"
