"""The multi-head adapter: a bottleneck for each head, on its slice of the input or its query."""

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.config import Modification

from .frozen_module import FrozenModule
from .kept_input import KeptInput
from .late import in_force
from .prefix_run import AttentionSlice
from .projection_view import device_of, shape_of
from .switch import ALWAYS_ON, Switch


class _Heads(nn.Module):
    """down_weight and up_weight (H, R, D); no biases. Init as a bottleneck's."""

    switch: Switch = ALWAYS_ON

    def __init__(self, heads: int, head_dim: int, modification: Modification, device, dtype):
        super().__init__()
        shape = (heads, modification.size, head_dim)
        self.down_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.up_weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        if modification.init == "lora":
            nn.init.uniform_(self.down_weight, -(head_dim**-0.5), head_dim**-0.5)
        else:
            nn.init.normal_(self.down_weight, std=0.02)
            nn.init.normal_(self.up_weight, std=0.02)
        self.scale = modification.scale

    def extra_repr(self) -> str:
        heads, rank, dim = self.down_weight.shape
        return f"{heads} heads, {dim} -> {rank} -> {dim}, scale={self.scale}"


class MultiHeadAdapter(_Heads):
    """Runs instead of an output projection: linear(heads + s ReLU(x_h Dᵀ) U by head). x_h is the
    head's slice of the attention's own input (paper section 3.3, multi-head)."""

    def __init__(self, linear: nn.Linear, heads: int, modification: Modification, dtype):
        width = shape_of(linear)[1]
        super().__init__(heads, width // heads, modification, device_of(linear), dtype)
        self.dropout = nn.Dropout(modification.dropout)
        self.frozen, self.kept_input = FrozenModule(linear), KeptInput()

    @property
    def dropout_p(self) -> float:
        """The probability of the method's own dropout, in training."""
        return self.dropout.p

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.dropout_p}"

    def forward(self, heads: Tensor) -> Tensor:
        x = self.kept_input.take()
        if self.switch.any_block and self.switch.is_off():
            return self.frozen(heads)
        return self.frozen(heads + self.update(x).view_as(heads))

    def update(self, x: Tensor) -> Tensor:
        """s ReLU(x_h Dᵀ) U of every head (B, T, H D)."""
        count, _, dim = self.down_weight.shape
        q = x.unflatten(-1, (count, dim)).transpose(1, 2)  # (B, H, T, D)
        nothing = q.new_empty(q.shape[0], count, 0, dim)
        update = functional.prefix_attention(
            q, nothing, nothing, self.down_weight, self.scale * self.up_weight, scale=1.0,
            form="relu", composition="add", dropout_p=in_force(self.dropout),
        )  # fmt: skip
        return update.transpose(1, 2).flatten(2)


class QueryHeads(_Heads):
    """The same on the frozen query projection: the attention function adds s ReLU(q Dᵀ) U. The
    attention's scale must not act on the query: the keys are divided by it, which is exact because
    ReLU(c x) = c ReLU(x) for c > 0. The attention's own dropout acts on ReLU(q Dᵀ)."""

    def forward(self, scaling: float) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v for the op, which multiplies the scores by ``scaling``."""
        return self.down_weight / scaling, self.scale * self.up_weight


class QuerySlice(AttentionSlice):
    """The object that the attention function finds on the module, like a prefix's slice."""

    form, composition = "relu", "add"

    def __init__(self, heads: QueryHeads):
        self.heads = self.switched = heads

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        """prefix_k and prefix_v (Hkv, R, D)."""
        return self.heads(scaling)
