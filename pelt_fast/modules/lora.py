"""LoRA on a linear layer (paper equation 6)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import FrozenLinear, LowRank
from pelt_fast.ops.lora.op import lora, lora_step

from .decision import Basis, DecidesOnce, Decision, is_public
from .frozen_module import QUANTISED, Foldable, FrozenModule, is_beside
from .generation import generation, keep_step, next_step
from .late import in_force
from .projection_view import device_of, shape_of
from .switch import ALWAYS_ON, Switch


class LoRALinear(DecidesOnce, Foldable):
    """Runs instead of ``linear``: x Wᵀ + b + s drop(x) Aᵀ Bᵀ.

    lora_a (R, K): Kaiming uniform with a = sqrt(5); lora_b (N, R): zero ("lora"), or both normal
    0.02 ("bert").
    """

    switch: Switch = ALWAYS_ON

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout_p: float, init: str,
                 dtype: torch.dtype):  # fmt: skip
        super().__init__()
        self.frozen = FrozenModule(linear)
        self.scale, self.dropout = scale, nn.Dropout(dropout_p)
        out_features, in_features = shape_of(linear)
        factory = dict(device=device_of(linear), dtype=dtype)
        self.lora_a = nn.Parameter(torch.empty(rank, in_features, **factory))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank, **factory))
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
        """Why the update is added to the layer's own output, or None."""
        return self.frozen.why_not_read()

    def decide(self) -> Decision:
        linear, reason = self.frozen.module, self.why_beside()
        if reason is not None:
            return Decision("own layer + update", reason, runs_op=False)
        weight, size = linear.weight, self.lora_a.shape[0]
        plan, held = dispatch.plan("lora", weight.device, 0.0, weight.dtype, size), None
        factors = (self.lora_a, self.lora_b)
        if plan.reason is None and is_beside(weight, factors) and is_public("lora_linear"):
            held = self.frozen.held_weight()
        given = None if held is None else FrozenLinear(*held)
        width = self.lora_a.shape[1]
        return Decision(plan.name, plan.reason, True, given, weight.dtype, weight.device, width)

    def rests_on(self, basis: Basis) -> None:
        basis.functions("lora_linear")
        self.frozen.rests_on(basis)
        for name, parameter in self._parameters.items():
            basis.value(self._parameters, name)
            basis.tensor(parameter)
        basis.probability(self.dropout, "p", self.dropout)

    def forward(self, x: Tensor) -> Tensor:
        off = self.switch.any_block and self.switch.is_off()
        if off or (self.merged and self.is_folded()):
            return self.frozen.bare(x)
        step = None if generation.kept is None else next_step(self, x)
        if step is not None:
            return step(x)
        decision, probabilities = self.decided(x)
        if not decision.runs_op:
            if decision.reason != QUANTISED:
                reason = decision.reason
                dispatch.fall_back(f"LoRA beside the layer's own output, because {reason}")
            return self.beside(self.frozen.bare, x, self.lora_b, self.scale)
        if probabilities is not None:
            factors = LowRank(self.lora_a, self.lora_b, self.scale)
            if generation.kept is not None and not any(probabilities):
                keep_step(self, x, lora_step, decision.given, factors)
            return lora(x, decision.given, factors, probabilities[0], True)
        linear = self.frozen.module
        return functional.lora_linear(
            x, linear.weight, linear.bias, self.lora_a, self.lora_b, scale=self.scale,
            dropout_p=in_force(self.dropout),
        )  # fmt: skip

    def beside(
        self, layer: Callable[[Tensor], Tensor], x: Tensor, lora_b: Tensor, scale: float = 1.0
    ) -> Tensor:
        """layer(x) + scale * drop(x) Aᵀ lora_bᵀ, in the dtype of the layer's output."""
        return functional.lora_beside(
            x, layer, self.lora_a, lora_b, scale=scale, dropout_p=in_force(self.dropout)
        )

    def extra_repr(self) -> str:
        rank, inputs = self.lora_a.shape
        return (
            f"{inputs} -> {rank} -> {self.lora_b.shape[0]}, scale={self.scale}, p={self.dropout_p}"
        )
