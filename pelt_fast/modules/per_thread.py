"""Values that a forward keeps for later in the same forward, separate for each thread."""

import threading
from typing import Any

import torch


class _Local(threading.local):
    """One value for each thread."""

    value: Any = None


class PerThread:
    """One value for the current forward of a thread; no other thread sees it.

    A hook puts the value. A site or a later hook of the same forward reads it. It is no tensor of a
    module: it is not in ``state_dict``, and a copy or a pickle holds nothing. Put None or call
    :meth:`take` when the forward no longer needs the value, because it may keep a graph alive.
    """

    def __init__(self):
        self.local = _Local()  # ``local.value`` is what the methods read and write in eager mode
        self.traced = None  # torch.compile follows an attribute, and traces in one thread

    def put(self, value: Any) -> None:
        """Keep ``value`` for this thread, instead of the value before."""
        if torch.compiler.is_compiling():
            self.traced = value
        else:
            self.local.value = value

    def get(self) -> Any:
        """The value that this thread put last, or None."""
        if torch.compiler.is_compiling():
            return self.traced
        return self.local.value

    def take(self) -> Any:
        """Return the value that this thread put last, and keep it no longer."""
        value = self.get()
        self.put(None)
        return value

    def __reduce__(self):
        return type(self), ()
