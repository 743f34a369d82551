"""LoRA on a linear layer (paper equation 6)."""

import math

import torch
from torch import Tensor, nn

from pelt_fast import functional

from .part import is_readable, shape_of, weight_of
from .slot import Foldable, Slot


class LoRALinear(Foldable):
    """Runs in the place of ``linear``: x Wᵀ + b + s drop(x) Aᵀ Bᵀ.

    lora_a (R, K): Kaiming uniform with a = sqrt(5); lora_b (N, R): zero ("lora"), or both normal
    0.02 ("bert").
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout_p: float, init: str,
                 dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.slot = Slot(linear)
        self.scale, self.dropout_p = scale, dropout_p
        out_features, in_features = shape_of(linear)
        place = dict(device=weight_of(linear).device, dtype=dtype)
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, **place))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, **place))
        if init == "lora":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_a, std=0.02)
            nn.init.normal_(self.lora_b, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        linear = self.slot.module
        if not is_readable(linear):
            return self._beside(x)
        if self.is_folded():
            return nn.functional.linear(x, linear.weight, linear.bias)
        return functional.lora_linear(
            x, linear.weight, linear.bias, self.lora_a, self.lora_b, scale=self.scale,
            dropout_p=self.dropout_p, training=self.training,
        )  # fmt: skip

    def _beside(self, x: Tensor) -> Tensor:
        """The rank update on whatever a quantised layer returns."""
        base = self.slot.bare(x).to(x.dtype)
        dropped = nn.functional.dropout(x, self.dropout_p, self.training)
        return functional.parallel_adapter(
            base, dropped, self.lora_a, None, self.lora_b, None, scale=self.scale,
            activation="identity", training=self.training,
        )  # fmt: skip

    def extra_repr(self) -> str:
        rank, inputs = self.lora_a.shape
        return (
            f"{inputs} -> {rank} -> {self.lora_b.shape[0]}, scale={self.scale}, p={self.dropout_p}"
        )
