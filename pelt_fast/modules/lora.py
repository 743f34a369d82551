"""LoRA on a linear layer (paper equation 6)."""

import math

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.ops.common import dispatch

from .frozen_module import QUANTISED, Foldable, FrozenModule
from .late import in_force
from .projection_view import device_of, shape_of


class LoRALinear(Foldable):
    """Runs in the place of ``linear``: x Wᵀ + b + s drop(x) Aᵀ Bᵀ.

    lora_a (R, K): Kaiming uniform with a = sqrt(5); lora_b (N, R): zero ("lora"), or both normal
    0.02 ("bert").
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout_p: float, init: str,
                 dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.frozen = FrozenModule(linear)
        self.scale, self.dropout = scale, nn.Dropout(dropout_p)
        out_features, in_features = shape_of(linear)
        place = dict(device=device_of(linear), dtype=dtype)
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, **place))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, **place))
        if init == "lora":
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_a, std=0.02)
            nn.init.normal_(self.lora_b, std=0.02)

    @property
    def dropout_p(self) -> float:
        """The probability of the method's own dropout, in training."""
        return self.dropout.p

    def why_beside(self) -> str | None:
        """Why the update is added to what the layer itself returns, or None."""
        return self.frozen.why_not_read()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_folded():
            return self.frozen.bare(x)
        reason = self.why_beside()
        if reason is not None:
            if reason != QUANTISED:
                dispatch.fall_back(f"LoRA beside the layer's own output, because {reason}")
            return self.added(self.frozen.bare(x), x, self.lora_b, self.scale)
        linear = self.frozen.module
        return functional.lora_linear(
            x, linear.weight, linear.bias, self.lora_a, self.lora_b, scale=self.scale,
            dropout_p=in_force(self.dropout),
        )  # fmt: skip

    def added(self, base: Tensor, x: Tensor, lora_b: Tensor, scale: float = 1.0) -> Tensor:
        """base + scale * drop(x) Aᵀ lora_bᵀ, in the dtype of what the layer returned."""
        return functional.parallel_adapter(
            base, self.dropout(x).to(base.dtype), self.lora_a, None, lora_b, None, scale=scale,
            activation="identity",
        )  # fmt: skip

    def extra_repr(self) -> str:
        rank, inputs = self.lora_a.shape
        return (
            f"{inputs} -> {rank} -> {self.lora_b.shape[0]}, scale={self.scale}, p={self.dropout_p}"
        )
