"""Values of parameters from before the method: eject and unmerge write them back.

They are not part of the model's state, and yet they are moved and cast with the model.
"""

from collections.abc import Callable

from torch import Tensor, nn


class Follower(nn.Module):
    """Holds tensors that are in no state_dict and among no buffers. What is done to the model
    (``.to``, ``.half``) is done to them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.map(fn)
        return super()._apply(fn, recurse)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by ``fn`` of it."""
        raise NotImplementedError


class ValuesBefore(Follower):
    """The values that eject and unmerge write back.

    ``trained``: the model's own parameters that train (task head, biases), by name.
    ``overwritten``: the parameters that merge wrote, as (module, name, value or None).
    """

    def __init__(self):
        super().__init__()
        self.trained: dict[str, Tensor] = {}
        self.overwritten: list[tuple[nn.Module, str, Tensor | None]] = []

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.trained = {name: fn(value) for name, value in self.trained.items()}
        self.overwritten = [
            (module, name, None if value is None else fn(value))
            for module, name, value in self.overwritten
        ]
