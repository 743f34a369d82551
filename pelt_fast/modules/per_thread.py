"""What a forward keeps for later in the same forward, apart for each thread that runs the model."""

import threading
from typing import Any

import torch


class _Local(threading.local):
    """A value of each thread's own."""

    value: Any = None


class PerThread:
    """One value for the forward a thread is in: what another thread puts here is not seen.

    A hook puts it, a site or a later hook of the same forward reads it. It is no tensor of a
    module: ``state_dict`` does not know it, and a copy or a pickle holds nothing. Put None, or
    take, when the forward has no more use for it: a value may hang on a graph.
    """

    def __init__(self):
        self.local = _Local()  # ``local.value`` is what the methods read and write in eager mode
        self.traced = None  # torch.compile follows an attribute, and traces in one thread

    def put(self, value: Any) -> None:
        """Keep ``value`` for this thread, in the place of what it had."""
        if torch.compiler.is_compiling():
            self.traced = value
        else:
            self.local.value = value

    def get(self) -> Any:
        """What this thread put last; None when that is nothing."""
        if torch.compiler.is_compiling():
            return self.traced
        return self.local.value

    def take(self) -> Any:
        """What this thread put last, which is then let go."""
        value = self.get()
        self.put(None)
        return value

    def __reduce__(self):
        return type(self), ()
