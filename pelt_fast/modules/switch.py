"""Whether a method acts: ``disabled`` turns it off for the forwards of one thread."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

import torch

from .base_parameters import BaseParameters
from .checkpointed import run_again_in
from .per_thread import PerThread


class Eager:
    """While any thread is in a block, torch.compile runs no graph: one that was compiled before has
    the method in it, for every thread."""

    def __init__(self):
        self.lock, self.blocks = threading.Lock(), 0
        self.stance = None

    def begin(self) -> None:
        """A block begins. Nothing was compiled where torch._dynamo was not imported."""
        with self.lock:
            if self.stance is None and "torch._dynamo" in sys.modules:
                # not inside of what is compiled: what is called there is traced as in a block
                with contextlib.suppress(RuntimeError):
                    self.stance = torch.compiler.set_stance("force_eager")
            self.blocks += 1

    def end(self) -> None:
        """A block ends."""
        with self.lock:
            self.blocks -= 1
            if not self.blocks and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None


EAGER = Eager()


class RunsEagerly:
    """Compiled models run eagerly from now on, until :meth:`end` or until nobody holds this."""

    def __init__(self):
        self.open = True
        EAGER.begin()

    def end(self) -> None:
        """They may run their graphs again."""
        if self.open:
            self.open = False
            EAGER.end()

    def __del__(self):
        self.end()


class Switch:
    """The switch of one injected method. Its sites read it in each forward.

    ``instead`` is what some modules have in place of their parameters where the method is off. It
    is put there when the first block begins, and removed when the last one ends.
    """

    def __init__(self):
        self._depth = PerThread()  # the number of blocks that this thread is in
        self._lock, self._blocks = threading.Lock(), 0
        self.instead: list[BaseParameters] = []
        self.any_block = False  # whether any thread is in one; all that a graph reads

    def is_off(self) -> bool:
        """Whether the base alone answers in this thread now. A checkpoint around this call runs
        again in backward as it runs now."""
        if not self.any_block:
            return False
        if torch.compiler.is_compiling():
            return True
        if not self._depth.local.value:
            return False
        run_again_in(self, self.turned_off)
        return True

    @contextlib.contextmanager
    def turned_off(
        self, find_instead: Callable[[], list[BaseParameters]] | None = None
    ) -> Iterator[None]:
        """In this block the base alone answers in this thread. ``find_instead`` finds ``instead``
        anew where no other block is open."""
        self._begin(find_instead)
        depth = self._depth.local.value or 0
        self._depth.local.value = depth + 1
        try:
            yield
        finally:
            self._depth.local.value = depth
            self._end()

    def _begin(self, find_instead: Callable[[], list[BaseParameters]] | None) -> None:
        EAGER.begin()
        try:
            with self._lock:
                if not self._blocks:
                    self._put(self.instead if find_instead is None else find_instead())
                self._blocks += 1
        except BaseException:
            EAGER.end()
            raise

    def _put(self, instead: list[BaseParameters]) -> None:
        """Put all of ``instead``; none of it where one fails."""
        with contextlib.ExitStack() as undo:
            for parameters in instead:
                parameters.put()
                undo.callback(parameters.give_back)
            undo.pop_all()
        self.instead, self.any_block = instead, True

    def _end(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                self.any_block = False
                for parameters in self.instead:
                    parameters.give_back()
        EAGER.end()

    def __reduce__(self):
        return type(self), ()


ALWAYS_ON = Switch()  # of a site that inject did not make
