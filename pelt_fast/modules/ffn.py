"""Adapters on a whole feed-forward block: sequential, or parallel (one wider FFN or beside it)."""

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.config import Modification
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import Bottleneck as BottleneckWeights
from pelt_fast.ops.common.bundles import FFNSettings, FrozenFFN
from pelt_fast.ops.widened_ffn.op import Stacked, ffn_step, widened_ffn

from .adapter import Bottleneck
from .decision import Basis, Decision, is_public
from .ffn_block import FFNBlock
from .frozen_module import QUANTISED, FrozenModule
from .generation import generation, keep_step, next_step
from .kept_input import KeptInput
from .late import Dropout
from .packing import Packing, Packings
from .projection_view import device_of, parameter_of, shape_of, weight_of


class _FFNAdapter(Bottleneck):
    """A bottleneck from the block's input width to its output width."""

    def __init__(self, ffn: FFNBlock, modification: Modification, dtype: torch.dtype):
        device, (outputs, _) = device_of(ffn.in_proj.module), shape_of(ffn.out_proj.module)
        width = shape_of(ffn.in_proj.module)[1]
        inputs = outputs if modification.insertion == "sequential" else width
        super().__init__(inputs, outputs, modification, device, dtype)
        self.ffn = ffn

    def frozen_weight(self) -> Tensor:
        return weight_of(self.ffn.out_proj.module)


class SequentialFFNAdapter(_FFNAdapter):
    """Runs instead of the block: adapter(ffn(x)), after the output dropout."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        off = self.switch.any_block and self.switch.is_off()
        return y if off else self.sequential(y)


class LayerAdapter(_FFNAdapter):
    """Runs instead of a whole layer: adapter(layer(..)), after its last add and norm (Pfeiffer
    in a pre-norm model)."""

    def __init__(self, layer: nn.Module, ffn: FFNBlock, modification: Modification, dtype):
        super().__init__(ffn, modification, dtype)
        self.frozen = FrozenModule(layer)

    def forward(self, *args, **kwargs):
        out = self.frozen(*args, **kwargs)
        if self.switch.any_block and self.switch.is_off():
            return out
        if isinstance(out, tuple):
            return self.sequential(out[0]), *out[1:]
        return self.sequential(out)


class NormAdapter(_FFNAdapter):
    """Runs instead of the norm after a post-norm block. The norm's input z is the block's output
    plus the block's input: LN(z + Δ(LN(z))) (Pfeiffer)."""

    def __init__(self, norm: nn.Module, ffn: FFNBlock, modification: Modification, dtype):
        super().__init__(ffn, modification, dtype)
        self.frozen = FrozenModule(norm)

    def forward(self, z: Tensor) -> Tensor:
        if self.switch.any_block and self.switch.is_off():
            return self.frozen(z)
        return self.frozen(self.parallel(z, self.frozen(z)))


class ParallelFFNAdapter(_FFNAdapter):
    """Runs instead of the block: one wider FFN (docs/maths.md#i3).

    One buffer holds the frozen in-projection (and gate), and below them the rows of the trainable
    down projection. Each call of the op first copies these rows there, in forward and backward. A
    second buffer holds the out-projection and the columns of the up projection, unless an output
    dropout acts between the two. Quantised projections compute their own products, and the rest of
    the block is fused between them.
    """

    def __init__(self, ffn: FFNBlock, modification: Modification, dtype: torch.dtype):
        super().__init__(ffn, modification, dtype)
        # an update before the output dropout is dropped by it: the op then has no output dropout
        self.before_dropout = modification.placement == "before_dropout"
        self.output_dropout = Dropout() if self.before_dropout else ffn.output_dropout
        stacked, out = self._frozen
        columns = self.output_dropout.p == 0 and out is not None
        self.packings = Packings(
            None if None in stacked else Packing(0, modification.size),
            Packing(1, modification.size) if columns else None,
        )

    def why_not_fused(self) -> str | None:
        """The reason this runs as the model's own FFN and an adapter beside it, or None."""
        if self.layer_norm != "none":
            return "the adapter has a LayerNorm of its own"
        return self.ffn.why_not_fused()

    def decide(self) -> Decision:
        weight, reason = self.frozen_weight(), self.why_not_fused()
        if reason is not None and self.layer_norm == "none" and self.ffn.is_quantised:
            return Decision("own products + fused rest", QUANTISED, runs_op=False)
        if reason is not None:
            return Decision("own FFN + adapter", reason, runs_op=False)
        plan = dispatch.plan("ffn", weight.device, 0.0, weight.dtype, self.down_weight.shape[0])
        given = None
        known = plan.reason is None and is_public("ffn_parallel_adapter")
        if known and self.is_checked(weight):
            given = self._given()
        width = self.down_weight.shape[1]
        return Decision(plan.name, plan.reason, True, given, weight.dtype, weight.device, width)

    def _given(self) -> tuple[FrozenFFN, str, Packings | None] | None:
        """The frozen weights, the activation's name and the buffers, as the op takes them."""
        weights = self.ffn.held_weights()
        return None if weights is None else (weights, self.ffn.activation, self._packings_now())

    def rests_on(self, basis: Basis) -> None:
        self.ffn.rests_on(basis)
        basis.functions("ffn_parallel_adapter")
        basis.value(self.__dict__, "_is_fsdp_managed_module")
        for dropout in (self.ffn.activation_dropout, self.output_dropout):
            dropout.rests_on(basis)
        super().rests_on(basis)

    def update_decision(self, x: Tensor) -> tuple[Decision, None]:
        """Beside the model's own block, the public function checks each call."""
        return self.decision(), None

    def adapter_input(self) -> Tensor | None:
        """What the adapter reads; None: the block's own input."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        adapter_x = self.adapter_input()
        off = self.switch.any_block and self.switch.is_off()
        if off or (self.merged and self.is_folded()):
            return self.ffn(x)
        step = None if generation.kept is None else next_step(self, x)
        y = self._decided(x, adapter_x) if step is None else step(x, adapter_x)
        return self.ffn.output_dropout(y) if self.before_dropout else y

    def _decided(self, x: Tensor, adapter_x: Tensor | None) -> Tensor:
        """What the decision says, without a later output dropout."""
        decision, probabilities = self.decided(x)
        if decision.reason == QUANTISED:
            return self._beside(x, adapter_x)
        if not decision.runs_op:
            dispatch.fall_back(
                f"parallel adapter beside the model's own FFN, because {decision.reason}"
            )
            base = self.ffn(x, not self.before_dropout)
            return self.parallel(base, x if adapter_x is None else adapter_x)
        if probabilities is None:
            return self._checked(x, adapter_x)
        inner, output, own = probabilities
        ffn, name, buffers = decision.given
        adapter = BottleneckWeights(self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        settings = FFNSettings(name, self.activation, self.scale, own, inner, output, None)
        if generation.kept is not None and not any(probabilities):
            keep_step(self, x, ffn_step, adapter_x, ffn, adapter, settings)
        stacked = Stacked(None, None, buffers)
        return widened_ffn(x, adapter_x, ffn, adapter, stacked, settings, True)

    def _checked(self, x: Tensor, adapter_x: Tensor | None) -> Tensor:
        """Call the public function, which checks its arguments."""
        ffn: FrozenFFN = self.ffn.weights()
        return functional.ffn_parallel_adapter(
            x, ffn.in_weight, ffn.in_bias, ffn.out_weight, ffn.out_bias, *self.weights,
            adapter_x=adapter_x, gate_weight=ffn.gate_weight, gate_bias=ffn.gate_bias,
            packings=self._packings_now(), **self._block_settings, **self.settings,
        )  # fmt: skip

    def _beside(self, x: Tensor, adapter_x: Tensor | None) -> Tensor:
        """The block of quantised projections: they compute their own products."""
        return functional.ffn_adapter_beside(
            x, self.ffn.in_proj, self.ffn.out_proj, *self.weights, adapter_x=adapter_x,
            gate_layer=self.ffn.gate_proj, **self._block_settings, **self.settings,
        )  # fmt: skip

    @property
    def _block_settings(self) -> dict:
        """The block's own activation and dropouts now, as keyword arguments."""
        return dict(
            ffn_activation=self.ffn.activation,
            activation_dropout_p=self.ffn.activation_dropout.now,
            output_dropout_p=self.output_dropout.now,
        )

    @property
    def _frozen(self) -> tuple[list[nn.Parameter | None], nn.Parameter | None]:
        """The parameters that hold gate and in, each once, and out. None for one that is stored
        transposed."""
        *stacked, out = (parameter_of(projection.module) for projection in self.ffn.projections)
        return list(dict.fromkeys(stacked)), out

    def _packings_now(self) -> Packings | None:
        """The buffers, for the op to fill; none while tracing."""
        if torch.compiler.is_compiling():
            return None  # a buffer written in every call would be one more graph input
        if getattr(self, "_is_fsdp_managed_module", False):
            return None  # FSDP2 gathers the weights into its own storage
        self.packings.pack_again(*self._frozen)
        return self.packings

    @property
    def is_packed(self) -> bool:
        """Whether the frozen weights are stored in the packed buffers."""
        return self.packings.hold(*self._frozen)

    def pack(self) -> None:
        """Move the frozen weights into buffers with room for the trainable blocks."""
        self.packings.pack(*self._frozen)
        self.decide_again()

    def leave_unpacked(self) -> None:
        """Never use the buffers again: each frozen weight keeps its own storage."""
        self.unpack()
        self.packings = Packings(None, None)
        self.decide_again()

    def unpack(self) -> None:
        """Move the frozen weights back to their own storage, bit for bit."""
        self.packings.unpack(*self._frozen)
        self.decide_again()

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self.packings.forget(*self._frozen)  # the next call packs the current weights
        self.decide_again()
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.packings.adopt(*self._frozen)  # assign=True registers other parameters
        self.decide_again()


class ResidualFFNAdapter(ParallelFFNAdapter):
    """Runs instead of the block: ffn(norm(x)) + Δ(x), where x is the residual stream that the
    block's norm reads (the paper's mBART). x and norm(x) differ, so the first projections cannot be
    stacked. The second projections still can."""

    def __init__(self, ffn: FFNBlock, modification: Modification, dtype: torch.dtype):
        super().__init__(ffn, modification, dtype)
        self.packings.stacked, self.kept_input = None, KeptInput()

    def adapter_input(self) -> Tensor:
        return self.kept_input.take()
