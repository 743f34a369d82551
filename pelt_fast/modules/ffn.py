"""Adapters on a whole feed-forward block: parallel (a wider FFN, or beside it) and sequential."""

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.config import Modification
from pelt_fast.ops.common import dispatch

from .activation import name_of
from .adapter import Bottleneck
from .frozen_module import FrozenModule, described, is_repatched
from .kept_input import KeptInput
from .late import Attribute, Dropout
from .packing import Packing, Packings
from .projection_view import device_of, parameter_of, shape_of


class FrozenFFN:
    """The feed-forward block of one layer: its projections, its activation and its own dropouts,
    the last two read when they are needed.

    ``block`` is the module whose call is the whole block, None where the layer spells it out.
    ``places`` are where the projections were found; ``why_itself`` says why the block does more
    than this class knows, if so: it then runs its own forward.
    """

    def __init__(
        self,
        block: nn.Module | None,
        in_proj: nn.Module,
        out_proj: nn.Module,
        gate_proj: nn.Module | None,
        activation: Attribute,
        activation_dropout: Dropout,
        output_dropout: Dropout,
        places: list[Attribute],
        why_itself: str | None = None,
    ):
        self.in_proj, self.out_proj = FrozenModule(in_proj), FrozenModule(out_proj)
        self.gate_proj = None if gate_proj is None else FrozenModule(gate_proj)
        self.activate = activation
        self.activation_dropout, self.output_dropout = activation_dropout, output_dropout
        self.block = None if block is None else FrozenModule(block)
        self._forward = None if block is None else type(block).forward
        self._found = [(place, place.value) for place in places]
        self._why_itself = why_itself

    @property
    def activation(self) -> str | None:
        """The name the ops know the activation by, or None."""
        return name_of(self.activate.value)

    @property
    def projections(self) -> list[FrozenModule]:
        """gate (if any), in, out."""
        gate = [] if self.gate_proj is None else [self.gate_proj]
        return [*gate, self.in_proj, self.out_proj]

    def why_not_fused(self) -> str | None:
        """The reason the block cannot run as one op, or None."""
        if self._why_itself is not None:
            return self._why_itself
        if self.block is not None and is_repatched(self.block.module, self._forward):
            return "the forward of the block's class was replaced"
        if self.activation is None:
            return f"the ops do not know its activation ({described(self.activate.value)})"
        if not all(place.value is found for place, found in self._found):
            return "a projection is not the one that was there at inject"
        if not all(projection.is_plain for projection in self.projections):
            return (
                "a projection is not a plain frozen nn.Linear (LoRA on it, trained, hooked,"
                " patched, offloaded or quantised)"
            )
        if len({projection.module.weight.dtype for projection in self.projections}) > 1:
            return "its projections are of several dtypes"
        if any(p is None or p >= 1 for p in (self.activation_dropout.p, self.output_dropout.p)):
            return "the ops do not know its dropout"
        return None

    def __call__(self, x: Tensor, output_dropout: bool = True) -> Tensor:
        """The block as the model itself runs it, output dropout included unless told."""
        if self.block is not None and (output_dropout or self.output_dropout.at is None):
            return self.block.bare(x)
        if self.gate_proj is None:
            h = self.activate.run(self.in_proj(x))
        else:
            h = self.activate.run(self.gate_proj(x)) * self.in_proj(x)
        y = self.out_proj(self.activation_dropout(h))
        return self.output_dropout(y) if output_dropout else y


class _FFNAdapter(Bottleneck):
    """A bottleneck from the block's input width to its output width."""

    def __init__(self, ffn: FrozenFFN, modification: Modification, dtype: torch.dtype):
        device, (outputs, _) = device_of(ffn.in_proj.module), shape_of(ffn.out_proj.module)
        width = shape_of(ffn.in_proj.module)[1]
        inputs = outputs if modification.insertion == "sequential" else width
        super().__init__(inputs, outputs, modification, device, dtype)
        self.ffn = ffn


class SequentialFFNAdapter(_FFNAdapter):
    """Runs in the place of the block: adapter(ffn(x)), after the output dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return self.sequential(self.ffn(x))


class LayerAdapter(_FFNAdapter):
    """Runs in the place of a whole layer: adapter(layer(..)), after its last add and norm (Pfeiffer
    in a pre-norm model)."""

    def __init__(self, layer: nn.Module, ffn: FrozenFFN, modification: Modification, dtype):
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

    def __init__(self, norm: nn.Module, ffn: FrozenFFN, modification: Modification, dtype):
        super().__init__(ffn, modification, dtype)
        self.frozen = FrozenModule(norm)

    def forward(self, z: Tensor) -> Tensor:
        return self.frozen(self.parallel(z, self.frozen(z)))


class ParallelFFNAdapter(_FFNAdapter):
    """Runs in the place of the block: one wider FFN (design note I3).

    The frozen in-projection (and gate) lives above the rows of the trainable down projection, which
    each call of the op copies there first, forward and backward; the out-projection likewise beside
    the columns of the up projection, where no output dropout stands between the two.
    """

    def __init__(self, ffn: FrozenFFN, modification: Modification, dtype: torch.dtype):
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

    def adapter_input(self) -> Tensor | None:
        """What the adapter reads; None is what the block reads."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        adapter_x = self.adapter_input()
        if self.is_folded():
            return self.ffn(x)
        reason = self.why_not_fused()
        if reason is not None:
            dispatch.fall_back(f"parallel adapter beside the model's own FFN, because {reason}")
            base = self.ffn(x, not self.before_dropout)
            y = self.parallel(base, x if adapter_x is None else adapter_x)
        else:
            y = self._widened(x, adapter_x)
        return self.ffn.output_dropout(y) if self.before_dropout else y

    def _widened(self, x: Tensor, adapter_x: Tensor | None) -> Tensor:
        ffn = self.ffn
        gate = None if ffn.gate_proj is None else ffn.gate_proj.module
        in_proj, out_proj = ffn.in_proj.module, ffn.out_proj.module
        return functional.ffn_parallel_adapter(
            x, in_proj.weight, in_proj.bias, out_proj.weight, out_proj.bias, *self.weights,
            adapter_x=adapter_x, gate_weight=None if gate is None else gate.weight,
            gate_bias=None if gate is None else gate.bias,
            ffn_activation=ffn.activation, activation_dropout_p=ffn.activation_dropout.now,
            output_dropout_p=self.output_dropout.now, packings=self._packings_now(),
            **self.settings,
        )  # fmt: skip

    @property
    def _frozen(self) -> tuple[list[nn.Parameter | None], nn.Parameter | None]:
        """The parameters that hold gate and in, each once, and out; None for one that lies
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

    def leave_unpacked(self) -> None:
        """Give up the buffers for good: each frozen weight keeps storage of its own."""
        self.unpack()
        self.packings = Packings(None, None)

    def unpack(self) -> None:
        """Give the frozen weights storage of their own again, bit for bit."""
        self.packings.unpack(*self._frozen)

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self.packings.forget(*self._frozen)  # pack what is there now on the next call
        return result

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.packings.adopt(*self._frozen)  # assign=True registers other parameters


class ResidualFFNAdapter(ParallelFFNAdapter):
    """Runs in the place of the block: ffn(norm(x)) + Δ(x), x the residual stream that the block's
    own norm reads (the paper's mBART). x and norm(x) are two inputs: nothing to stack, but the
    adapter's columns still stand beside the block's on the way out."""

    def __init__(self, ffn: FrozenFFN, modification: Modification, dtype: torch.dtype):
        super().__init__(ffn, modification, dtype)
        self.packings.stacked, self.kept_input = None, KeptInput()

    def adapter_input(self) -> Tensor:
        return self.kept_input.take()
