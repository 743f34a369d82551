"""bitsandbytes' 4-bit layers on a CPU with bf16 instructions.

In evaluation such a layer repacks its weight, for good, into a form whose product has no gradient
of x: a model that was evaluated once trains with wrong gradients, without an error. It asks an
attribute of its own before it does that, and a state dict gives its weight the first form again.
"""

import contextlib
import copy
from collections.abc import Iterator

from torch import nn

from .undo_log import UndoLog

_MAY_REPACK = "support_avx512bf16_for_cpu"


class FirstForm:
    """``layer`` keeps its weight in the first form. One that was repacked has it again; ``undo``
    gives back the other, whose scales were rounded."""

    def __init__(self, layer: nn.Module):
        self.layer, self.before = layer, None
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            self.before = layer.weight.data, copy.copy(state)
        layer.state_dict()
        self.after = layer.weight.data
        setattr(layer, _MAY_REPACK, False)

    def undo(self) -> None:
        """Let the layer repack again. A weight that was moved since stays as it is."""
        setattr(self.layer, _MAY_REPACK, True)
        weight = self.layer.weight
        if self.before is not None and weight.data_ptr() == self.after.data_ptr():
            weight.data, weight.quant_state = self.before


def keep_gradients(model: nn.Module, changes: UndoLog) -> None:
    """While the method is in the model no layer repacks its weight."""
    for layer in _repacking(model):
        changes.record(FirstForm(layer))


@contextlib.contextmanager
def no_repacking(model: nn.Module) -> Iterator[None]:
    """In this block no layer repacks its weight."""
    with contextlib.ExitStack() as guards:
        for layer in _repacking(model):
            guards.callback(FirstForm(layer).undo)
        yield


def _repacking(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module.__dict__.get(_MAY_REPACK)]
