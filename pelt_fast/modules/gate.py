"""Forwards of many threads, and changes of the model between them."""

import contextlib
import threading
from collections.abc import Iterator

from .per_thread import PerThread


class Gate:
    """Lets forwards run side by side, and a change of the model run alone. A forward that begins
    while a change runs waits for it, and a change waits for the forwards that run."""

    def __init__(self):
        self._free = threading.Condition()
        self._running = 0
        self._changing: int | None = None  # the thread that changes the model
        self._depth = PerThread()  # the forwards that this thread is in

    def enter(self) -> None:
        """A forward of this thread begins."""
        depth = self._depth.local.value or 0
        self._depth.local.value = depth + 1
        if depth or self._changing == threading.get_ident():
            return
        with self._free:
            self._free.wait_for(lambda: self._changing is None)
            self._running += 1

    def leave(self) -> None:
        """The forward has ended."""
        depth = self._depth.local.value or 0
        self._depth.local.value = max(depth - 1, 0)
        if depth != 1 or self._changing == threading.get_ident():
            return
        with self._free:
            self._running -= 1
            self._free.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """In this block no forward of another thread runs. RuntimeError inside of a forward."""
        if self._depth.local.value:
            raise RuntimeError("a forward of this thread is running: change the methods after it")
        with self._free:
            self._free.wait_for(lambda: self._changing is None and not self._running)
            self._changing = threading.get_ident()
        try:
            yield
        finally:
            with self._free:
                self._changing = None
                self._free.notify_all()

    def __reduce__(self):
        return type(self), ()
