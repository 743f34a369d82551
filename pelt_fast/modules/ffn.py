"""Adapters on a whole feed-forward block: parallel (a wider FFN, or beside it) and sequential."""

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.config import Modification
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import Bottleneck as BottleneckWeights
from pelt_fast.ops.common.bundles import FFNSettings, FrozenFFN
from pelt_fast.ops.widened_ffn.op import Stacked, widened_ffn

from .adapter import Bottleneck
from .decision import Basis, Decision, is_public
from .ffn_block import FFNBlock
from .frozen_module import FrozenModule
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
    """Runs in the place of the block: adapter(ffn(x)), after the output dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return self.sequential(self.ffn(x))


class LayerAdapter(_FFNAdapter):
    """Runs in the place of a whole layer: adapter(layer(..)), after its last add and norm (Pfeiffer
    in a pre-norm model)."""

    def __init__(self, layer: nn.Module, ffn: FFNBlock, modification: Modification, dtype):
        super().__init__(ffn, modification, dtype)
        self.frozen = FrozenModule(layer)

    def forward(self, *args, **kwargs):
        out = self.frozen(*args, **kwargs)
        if isinstance(out, tuple):
            return self.sequential(out[0]), *out[1:]
        return self.sequential(out)


class NormAdapter(_FFNAdapter):
    """Runs in the place of the norm behind a post-norm block, whose input z is the sum of the block
    and its own input: LN(z + Δ(LN(z))) (Pfeiffer)."""

    def __init__(self, norm: nn.Module, ffn: FFNBlock, modification: Modification, dtype):
        super().__init__(ffn, modification, dtype)
        self.frozen = FrozenModule(norm)

    def forward(self, z: Tensor) -> Tensor:
        return self.frozen(self.parallel(z, self.frozen(z)))


class ParallelFFNAdapter(_FFNAdapter):
    """Runs in the place of the block: one wider FFN (docs/maths.md#i3).

    The frozen in-projection (and gate) lives above the rows of the trainable down projection, which
    each call of the op copies there first, forward and backward; the out-projection likewise beside
    the columns of the up projection, where no output dropout stands between the two.
    """

    def __init__(self, ffn: FFNBlock, modification: Modification, dtype: torch.dtype):
        super().__init__(ffn, modification, dtype)
        # before the output dropout the update is part of what it drops: the op then has none
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
        """Beside the model's own block the public function checks each call."""
        return self.decision(), None

    def adapter_input(self) -> Tensor | None:
        """What the adapter reads; None is what the block reads."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        adapter_x = self.adapter_input()
        if self.merged and self.is_folded():
            return self.ffn(x)
        decision, probabilities = self.decided(x)
        if not decision.runs_op:
            dispatch.fall_back(
                f"parallel adapter beside the model's own FFN, because {decision.reason}"
            )
            base = self.ffn(x, not self.before_dropout)
            y = self.parallel(base, x if adapter_x is None else adapter_x)
        elif probabilities is None:
            y = self._checked(x, adapter_x)
        else:
            inner, output, own = probabilities
            ffn, name, buffers = decision.given
            y = widened_ffn(
                x, adapter_x, ffn,
                BottleneckWeights(self.down_weight, self.down_bias, self.up_weight, self.up_bias),
                Stacked(None, None, buffers),
                FFNSettings(name, self.activation, self.scale, own, inner, output, None), True,
            )  # fmt: skip
        return self.ffn.output_dropout(y) if self.before_dropout else y

    def _checked(self, x: Tensor, adapter_x: Tensor | None) -> Tensor:
        """The public function, which checks what it is given."""
        ffn: FrozenFFN = self.ffn.weights()
        return functional.ffn_parallel_adapter(
            x, ffn.in_weight, ffn.in_bias, ffn.out_weight, ffn.out_bias, *self.weights,
            adapter_x=adapter_x, gate_weight=ffn.gate_weight, gate_bias=ffn.gate_bias,
            ffn_activation=self.ffn.activation,
            activation_dropout_p=self.ffn.activation_dropout.now,
            output_dropout_p=self.output_dropout.now, packings=self._packings_now(),
            **self.settings,
        )  # fmt: skip

    @property
    def _frozen(self) -> tuple[list[nn.Parameter | None], nn.Parameter | None]:
        """The parameters that hold gate and in, each once, and out; None for one that is kept
        transposed."""
        *stacked, out = (parameter_of(projection.module) for projection in self.ffn.projections)
        return list(dict.fromkeys(stacked)), out

    def _packings_now(self) -> Packings | None:
        """The buffers, for the op to fill; none while tracing."""
        if torch.compiler.is_compiling():
            return None  # a buffer written on every call would be one more graph input
        if getattr(self, "_is_fsdp_managed_module", False):
            return None  # FSDP2 gathers the weights into storage of its own
        self.packings.pack_again(*self._frozen)
        return self.packings

    @property
    def is_packed(self) -> bool:
        """Whether the frozen weights live in the packed buffers."""
        return self.packings.hold(*self._frozen)

    def pack(self) -> None:
        """Move the frozen weights into buffers with room for the trainable blocks."""
        self.packings.pack(*self._frozen)
        self.decide_again()

    def leave_unpacked(self) -> None:
        """Give up the buffers for good: each frozen weight keeps storage of its own."""
        self.unpack()
        self.packings = Packings(None, None)
        self.decide_again()

    def unpack(self) -> None:
        """Give the frozen weights storage of their own again, bit for bit."""
        self.packings.unpack(*self._frozen)
        self.decide_again()

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self.packings.forget(*self._frozen)  # pack what is there now on the next call
        self.decide_again()
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.packings.adopt(*self._frozen)  # assign=True registers other parameters
        self.decide_again()


class ResidualFFNAdapter(ParallelFFNAdapter):
    """Runs in the place of the block: ffn(norm(x)) + Δ(x), x the residual stream that the block's
    own norm reads (the paper's mBART). x and norm(x) are two inputs: nothing to stack, but the
    adapter's columns still stand beside the block's on the way out."""

    def __init__(self, ffn: FFNBlock, modification: Modification, dtype: torch.dtype):
        super().__init__(ffn, modification, dtype)
        self.packings.stacked, self.kept_input = None, KeptInput()

    def adapter_input(self) -> Tensor:
        return self.kept_input.take()
