"""Prompt tuning: trainable vectors in front of a stack's input."""

import torch
from torch import Tensor, nn

from pelt_fast.config import Modification

from .switch import ALWAYS_ON, Switch


class Prompt(nn.Module):
    """``embedding`` (P, d), normal 0.02: virtual tokens at the start of every row of a batch."""

    switch: Switch = ALWAYS_ON
    hides = False  # every row sees every virtual token

    def __init__(self, modification: Modification, width: int, device, dtype: torch.dtype):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.embedding = nn.Parameter(torch.empty(modification.size, width, **factory))
        nn.init.normal_(self.embedding, std=0.02)

    @property
    def length(self) -> int:
        """P."""
        return self.embedding.shape[0]

    @property
    def embeddings(self) -> dict[int | None, Tensor]:
        """What a cache remembers of the prompt, by method: there is one."""
        return {None: self.embedding}

    def now(self, length: int | None = None) -> "Prompt | None":
        """What acts in this forward: this prompt, or None where the method is off. ``length`` is
        for prompts of several methods."""
        return None if self.switch.is_off() else self

    def visible(self, mask: Tensor) -> Tensor:
        """The columns (B, P) of the virtual tokens in a padding mask (B, T), in its dtype."""
        return mask.new_ones(mask.shape[0], self.length)

    def methods(self, rows: int, device: torch.device) -> Tensor | None:
        """The method of each row; None: all rows are under one."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """[prompt; x] for x (B, T, d), in x's dtype."""
        prompt = self.embedding.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat([prompt, x], 1)

    def extra_repr(self) -> str:
        return f"length={self.length}, width={self.embedding.shape[1]}"
