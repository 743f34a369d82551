"""The input of one module, kept for a site that reads it later in the same forward."""

from torch import Tensor, nn

from .per_thread import PerThread
from .switch import ALWAYS_ON, Switch


class KeptInput:
    """Forward pre-hook (with keywords) that keeps a module's first argument until it is taken."""

    switch: Switch = ALWAYS_ON  # of a site that several methods share a module with

    def __init__(self, keyword: str = "hidden_states"):
        self.keyword = keyword
        self._x = PerThread()

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.switch.any_block and self.switch.is_off():
            return
        self._x.put(args[0] if args else kwargs[self.keyword])

    def take(self) -> Tensor:
        """Return the input of this forward and keep it no longer."""
        return self._x.take()
