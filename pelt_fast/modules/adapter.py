"""The bottleneck's tensors, and the adapters at an attention's output projection."""

import math

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.config import Modification
from pelt_fast.ops.adapter.op import adapter, adapter_step
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import AdapterNorm, Transform
from pelt_fast.ops.common.bundles import Bottleneck as BottleneckWeights

from .decision import Basis, DecidesOnce, Decision, is_public
from .frozen_module import Foldable, FrozenModule, is_beside
from .generation import generation, keep_step, next_step
from .hooked import at_hand, is_away
from .kept_input import KeptInput
from .late import in_force
from .projection_view import device_of, shape_of, weight_of
from .switch import ALWAYS_ON, Switch

_NO_NORM = AdapterNorm(None, None, "none")


class Bottleneck(DecidesOnce, Foldable):
    """down_weight (R, K), down_bias (R), up_weight (N, R), up_bias (N), and if the modification
    has them: norm (adapter LayerNorm; because of its type and name, a Trainer applies no weight
    decay to its parameters) and scale (learned).

    Init "lora": Kaiming uniform down, zero up, zero biases. "bert": normal 0.02, zero biases.
    """

    switch: Switch = ALWAYS_ON

    def __init__(
        self, inputs: int, outputs: int, modification: Modification, device, dtype: torch.dtype
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        rank = modification.size
        self.down_weight = nn.Parameter(torch.empty(rank, inputs, **factory))
        self.down_bias = nn.Parameter(torch.zeros(rank, **factory))
        self.up_weight = nn.Parameter(torch.zeros(outputs, rank, **factory))
        self.up_bias = nn.Parameter(torch.zeros(outputs, **factory))
        if modification.init == "lora":
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.down_weight, std=0.02)
            nn.init.normal_(self.up_weight, std=0.02)
        self.register_module("norm", None)
        if modification.layer_norm != "none":
            width = inputs if modification.layer_norm == "in" else outputs
            self.norm = nn.LayerNorm(width, **factory)
        self.scale = modification.scale
        if modification.composition.startswith("learned"):
            size = outputs if modification.composition == "learned_channel_scale" else 1
            self.scale = nn.Parameter(torch.full((size,), float(modification.scale), **factory))
        self.activation = modification.activation
        self.layer_norm = modification.layer_norm
        self.residual = modification.residual
        self.dropout = nn.Dropout(modification.dropout)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """down_weight, down_bias, up_weight, up_bias."""
        return self.down_weight, self.down_bias, self.up_weight, self.up_bias

    @property
    def dropout_p(self) -> float:
        """The probability of the method's own dropout, in training."""
        return self.dropout.p

    @property
    def settings(self) -> dict:
        """The keyword arguments every adapter function shares."""
        return dict(scale=self.scale, activation=self.activation, dropout_p=in_force(self.dropout))

    @property
    def norm_weight(self) -> nn.Parameter | None:
        """The adapter LayerNorm's weight."""
        return None if self.norm is None else self.norm.weight

    @property
    def norm_bias(self) -> nn.Parameter | None:
        """The adapter LayerNorm's bias."""
        return None if self.norm is None else self.norm.bias

    @property
    def normed(self) -> dict:
        """The adapter LayerNorm's keyword arguments."""
        return dict(layer_norm=self.layer_norm, norm_weight=self.norm_weight,
                    norm_bias=self.norm_bias)  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        for last in ("weight", "bias"):  # the names in earlier versions
            if f"{prefix}norm_{last}" in state_dict:
                state_dict[f"{prefix}norm.{last}"] = state_dict.pop(f"{prefix}norm_{last}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def frozen_weight(self) -> Tensor:
        """A weight of the frozen module. It tells the device and the dtype of the site."""
        return weight_of(self.frozen.module)

    def decide(self) -> Decision:
        weight = self.frozen_weight()
        plan = dispatch.plan("adapter", weight.device, 0.0, weight.dtype, self.down_weight.shape[0])
        known = plan.reason is None and is_public("parallel_adapter", "sequential_adapter")
        given = self._norm_now() if known and self.is_checked(weight) else None
        return Decision(
            plan.name, plan.reason, True, given, weight.dtype, weight.device,
            self.down_weight.shape[1],
        )  # fmt: skip

    def rests_on(self, basis: Basis) -> None:
        basis.functions("parallel_adapter", "sequential_adapter")
        for name, parameter in self._parameters.items():
            basis.value(self._parameters, name)
            if parameter is not None:
                basis.tensor(parameter)
        basis.value(self._modules, "norm")
        if self.norm is not None:
            basis.linear(self.norm)
        basis.probability(self.dropout, "p", self.dropout)

    def is_checked(self, weight: Tensor) -> bool:
        """Whether the op takes the adapter's tensors with a frozen ``weight`` without conversion:
        same device, a dtype at least as wide, no learned scale, a LayerNorm in the weight's dtype
        that is not offloaded."""
        if not isinstance(self.scale, (int, float)):
            return False
        small = [p for p in self._parameters.values() if p is not None]
        if self.norm is not None:
            norm = [self.norm_weight, self.norm_bias]
            if is_away(self.norm) or any(p is None or p.dtype is not weight.dtype for p in norm):
                return False
            small += norm
        return len(small) - (0 if self.norm is None else 2) == 4 and is_beside(weight, small)

    def _norm_now(self) -> AdapterNorm:
        """The adapter LayerNorm, as the op takes it."""
        if self.norm is None:
            return _NO_NORM
        return AdapterNorm(self.norm_weight, self.norm_bias, self.layer_norm)

    def sequential(self, h: Tensor) -> Tensor:
        """h + Δ(h), or Δ(h) alone without its residual."""
        if not self.residual:
            return self.parallel(torch.zeros_like(h), h)
        return self._update(None, h)

    def parallel(self, base: Tensor, x: Tensor) -> Tensor:
        """base + Δ(x), in the dtype of ``base``. A layer in a wider dtype than its neighbours
        returns a wider dtype than it reads."""
        return self._update(base, x.to(base.dtype))

    def _update(self, base: Tensor | None, x: Tensor) -> Tensor:
        step = None if generation.kept is None else next_step(self, x)
        if step is not None:
            return step(x, base)
        decision, probabilities = self.update_decision(x)
        if probabilities is not None:
            weights = BottleneckWeights(*self.weights)
            transform = Transform(self.activation, self.scale, probabilities[-1], None)
            if generation.kept is not None and not any(probabilities):
                keep_step(self, x, adapter_step, weights, decision.given, transform)
            return adapter(x, base, weights, decision.given, transform, True)
        if base is None:
            return self._run(functional.sequential_adapter, x)
        return self._run(functional.parallel_adapter, base, x)

    def update_decision(self, x: Tensor) -> tuple[Decision, list[float] | None]:
        """The decision of the adapter's own op."""
        return self.decided(x)

    def _run(self, function, *inputs: Tensor) -> Tensor:
        """``function`` of the adapter. Offloaded weights of its LayerNorm are loaded first, because
        the LayerNorm itself is never called."""
        if self.norm is not None and is_away(self.norm):
            with at_hand([self.norm]):
                return function(*inputs, *self.weights, **self.settings, **self.normed)
        return function(*inputs, *self.weights, **self.settings, **self.normed)

    def extra_repr(self) -> str:
        rank, inputs = self.down_weight.shape
        shape = f"{inputs} -> {rank} -> {self.up_weight.shape[0]}"
        scale = "learned" if isinstance(self.scale, Tensor) else self.scale
        return (
            f"{shape}, {self.activation}, scale={scale}, p={self.dropout_p}, norm={self.layer_norm}"
        )


class SequentialAdapter(Bottleneck):
    """Runs instead of an output projection: adapter(linear(x)) (paper equation 4)."""

    def __init__(self, linear: nn.Linear, modification: Modification, dtype: torch.dtype):
        width, _ = shape_of(linear)
        super().__init__(width, width, modification, device_of(linear), dtype)
        self.frozen = FrozenModule(linear)

    def forward(self, x: Tensor) -> Tensor:
        y = self.frozen(x)
        off = self.switch.any_block and self.switch.is_off()
        return y if off or self.is_folded() else self.sequential(y)


class ParallelAttentionAdapter(Bottleneck):
    """Runs instead of an output projection, with an adapter that reads the attention's input:
    linear(heads + Δ(x)), as in the paper's code, or linear(heads) + Δ(x)."""

    def __init__(self, linear: nn.Linear, width: int, modification: Modification, dtype):
        before_output = modification.placement != "after_output"
        outputs = shape_of(linear)[1 if before_output else 0]
        super().__init__(width, outputs, modification, device_of(linear), dtype)
        self.before_output = before_output
        self.frozen, self.kept_input = FrozenModule(linear), KeptInput()

    def forward(self, heads: Tensor) -> Tensor:
        x = self.kept_input.take()
        if self.switch.any_block and self.switch.is_off():
            return self.frozen(heads)
        if self.before_output:
            return self.frozen(self.parallel(heads, x))
        return self.parallel(self.frozen(heads), x)
