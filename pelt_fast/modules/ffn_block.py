"""The frozen feed-forward block of one layer, as a site sees it."""

from torch import Tensor, nn

from pelt_fast.ops.common.bundles import FrozenFFN

from .activation import name_of
from .decision import Basis
from .frozen_module import FrozenModule, described, is_repatched
from .late import Attribute, Dropout


class FFNBlock:
    """The feed-forward block of one layer: its projections, its activation and its own dropouts.
    Activation and dropouts are read at each use.

    Args:
        block: the module whose call is the whole block; None if the layer's own code is the block.
        in_proj: the projection of the input; with a gate, the one that is multiplied.
        out_proj: the projection of the output.
        gate_proj: the gate's projection, or None.
        activation: where the activation is.
        activation_dropout: the dropout after it.
        output_dropout: the dropout on the block's output.
        projections_at: where the projections were found.
        why_itself: None, or why the block must run its own forward: it does more than this class
            knows.
    """

    def __init__(
        self,
        *,
        block: nn.Module | None,
        in_proj: nn.Module,
        out_proj: nn.Module,
        gate_proj: nn.Module | None,
        activation: Attribute,
        activation_dropout: Dropout,
        output_dropout: Dropout,
        projections_at: list[Attribute],
        why_itself: str | None = None,
    ):
        self.in_proj, self.out_proj = FrozenModule(in_proj), FrozenModule(out_proj)
        self.gate_proj = None if gate_proj is None else FrozenModule(gate_proj)
        self.activate = activation
        self.activation_dropout, self.output_dropout = activation_dropout, output_dropout
        self.block = None if block is None else FrozenModule(block)
        self._forward = None if block is None else type(block).forward
        self._projections_at = [(at, at.value) for at in projections_at]
        self._why_itself = why_itself

    @property
    def activation(self) -> str | None:
        """The ops' name of the activation, or None."""
        return name_of(self.activate.value)

    @property
    def projections(self) -> list[FrozenModule]:
        """gate (if any), in, out."""
        gate = [] if self.gate_proj is None else [self.gate_proj]
        return [*gate, self.in_proj, self.out_proj]

    def rests_on(self, basis: Basis) -> None:
        """Record in ``basis`` what :meth:`why_not_fused` and :attr:`is_quantised` read."""
        if self.block is not None:
            basis.module(self.block.module)
        self.activate.rests_on(basis)
        for at, _ in self._projections_at:
            basis.attribute(*at.source)
        for projection in self.projections:
            projection.rests_on(basis)

    def why_not_fused(self) -> str | None:
        """The reason the block cannot run as one op, or None."""
        return self._why_unknown() or self._why_not_read() or self._why_not_dropped()

    @property
    def is_quantised(self) -> bool:
        """Whether the projections are quantised and all else is known: they compute their own
        products, and the op does the work between them."""
        if not all(projection.is_quantised_alone for projection in self.projections):
            return False
        return self._why_unknown() is None and self._why_not_dropped() is None

    def _why_unknown(self) -> str | None:
        """Why it is not known what the block computes between its projections."""
        if self._why_itself is not None:
            return self._why_itself
        if self.block is not None and is_repatched(self.block.module, self._forward):
            return "the forward of the block's class was replaced"
        if self.activation is None:
            return f"the ops do not know its activation ({described(self.activate.value)})"
        if not all(at.value is projection for at, projection in self._projections_at):
            return "a projection is not the one that was there at inject"
        return None

    def _why_not_read(self) -> str | None:
        """Why the op cannot read the weights of the projections."""
        if not all(projection.is_plain for projection in self.projections):
            return (
                "a projection is not a plain frozen nn.Linear (LoRA on it, trained, hooked,"
                " patched, offloaded or quantised)"
            )
        if len({projection.module.weight.dtype for projection in self.projections}) > 1:
            return "its projections are of several dtypes"
        return None

    def _why_not_dropped(self) -> str | None:
        if any(p is None or p >= 1 for p in (self.activation_dropout.p, self.output_dropout.p)):
            return "the ops do not know its dropout"
        return None

    def weights(self) -> FrozenFFN:
        """The frozen weights as the op takes them."""
        gate = None if self.gate_proj is None else self.gate_proj.module
        in_proj, out_proj = self.in_proj.module, self.out_proj.module
        return FrozenFFN(
            in_proj.weight, in_proj.bias, None if gate is None else gate.weight,
            None if gate is None else gate.bias, out_proj.weight, out_proj.bias,
        )  # fmt: skip

    def held_weights(self) -> FrozenFFN | None:
        """The same, if they stay the same tensors until the basis changes; else None."""
        held = [projection.held_weight() for projection in self.projections]
        return None if None in held else self.weights()

    def __call__(self, x: Tensor, output_dropout: bool = True) -> Tensor:
        """The block as the model itself runs it, with its output dropout by default."""
        if self.block is not None and (output_dropout or self.output_dropout.at is None):
            return self.block.bare(x)
        if self.gate_proj is None:
            h = self.activate.run(self.in_proj(x))
        else:
            h = self.activate.run(self.gate_proj(x)) * self.in_proj(x)
        y = self.out_proj(self.activation_dropout(h))
        return self.output_dropout(y) if output_dropout else y
