"""A model that answers as the base of another one, whose weights it shares: DPO's reference."""

import copy

from torch import nn

from .disabled import disabled
from .handles import carrier_of


class AnswersAlone:
    """Mixin in front of a model's class: each call is in a block of ``disabled``.

    The modules are another model's. So what would change them, for that model too, does nothing:
    the mode, and whether parameters train.
    """

    def __call__(self, *args, **kwargs):
        with disabled(self):
            return super().__call__(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """In a block, too: it calls an encoder by itself."""
        with disabled(self):
            return super().generate(*args, **kwargs)

    def train(self, mode: bool = True):
        """Nothing: the mode is that of the model."""
        return self

    def requires_grad_(self, requires_grad: bool = True):
        """Nothing: what trains is the model's."""
        return self


def reference_model(model: nn.Module) -> nn.Module:
    """A model that shares every weight of ``model`` and answers as its base, in :func:`disabled`.

    For a trainer that asks for a reference model, as TRL's DPOTrainer. It takes no memory. It is in
    the mode of ``model`` (training or not), and is of no use after eject.

    Args:
        model: a model with a method, or a wrapper of one.

    Returns:
        A model of the same class.

    Raises:
        ValueError: nothing was injected. A call raises what ``disabled`` raises.

    Example:
        reference = pelt_fast.reference_model(model)
        trainer = trl.DPOTrainer(model, reference, args=arguments, train_dataset=pairs)
    """
    carrier = carrier_of(model)
    found = copy.copy(carrier)
    found.__dict__.pop("generate", None)  # the method's, which is bound to the model
    kind = type(carrier)
    found.__class__ = type(kind.__name__, (AnswersAlone, kind), {"__module__": kind.__module__})
    return found
