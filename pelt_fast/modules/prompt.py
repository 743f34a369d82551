"""Prompt tuning: trainable vectors in front of a stack's input."""

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification

from .switch import ALWAYS_ON, Switch


class Prompt(nn.Module):
    """``embedding`` (P, d), normal 0.02: virtual tokens at the start of every row of a batch."""

    switch: Switch = ALWAYS_ON

    def __init__(self, modification: Modification, width: int, device, dtype: torch.dtype):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.embedding = nn.Parameter(torch.empty(modification.size, width, **factory))
        nn.init.normal_(self.embedding, std=0.02)

    @property
    def length(self) -> int:
        """P."""
        return self.embedding.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[prompt; x] for x (B, T, d), in x's dtype."""
        prompt = self.embedding.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([prompt, x], 1)

    def extra_repr(self) -> str:
        return f"length={self.length}, width={self.embedding.shape[1]}"
