"""Tensors that are no part of a model, and yet are moved and cast with it."""

from collections.abc import Callable

from torch import Tensor, nn


class Follower(nn.Module):
    """Holds tensors beside a model's own: in no state_dict, among no buffers. What is done to the
    model (``.to``, ``.half``) is done to them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self.map(fn)
        return super()._apply(fn, recurse)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Put ``fn`` of each tensor in its place."""
        raise NotImplementedError


class Before(Follower):
    """What eject and unmerge give back: ``values`` of parameters by name, ``base`` as merge wrote
    over it, (module, name, value or None)."""

    def __init__(self):
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.base: list[tuple[nn.Module, str, Tensor | None]] = []

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.values = {name: fn(value) for name, value in self.values.items()}
        self.base = [
            (module, name, None if value is None else fn(value))
            for module, name, value in self.base
        ]
