"""Work that a thread starts and does not wait for: copies, bulk copies, products of a warpgroup.

Each piece is done when it is started (mode early), or when somebody waits for it (mode late). What
differs between the two runs was read or overwritten without a wait.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(eq=False)
class Work:
    """One piece. ``do`` moves the bytes and tells who waits for them."""

    do: Callable[[], None]
    done: bool = False

    def finish(self) -> None:
        """Do it, once."""
        if not self.done:
            self.done = True
            self.do()


class Asynchronous:
    """All that was started in a group of blocks. ``groups[key]`` are committed groups, oldest first."""

    def __init__(self, machine):
        self.machine = machine
        self.reset()

    def reset(self) -> None:
        self.open: dict[tuple, list[Work]] = {}
        self.groups: dict[tuple, list[list[Work]]] = {}
        self.free: list[Work] = []  # what nobody waits for by a group: an mbarrier counts it

    def start(self, work: Work, key: tuple | None = None) -> None:
        """Start a piece of work; ``key`` names the group that it will be committed to."""
        if not self.machine.mode.late:
            work.finish()
        if key is not None:
            self.open.setdefault(key, []).append(work)
        elif not work.done:
            self.free.append(work)

    def commit(self, key: tuple) -> None:
        """What was started under a key becomes its newest group."""
        self.groups.setdefault(key, []).append(self.open.pop(key, []))

    def wait(self, key: tuple, left: int) -> list[Work]:
        """Finish all groups of a key but the newest ``left``; what was in them."""
        groups = self.groups.get(key, [])
        finished = []
        while len(groups) > left:
            for work in groups.pop(0):
                work.finish()
                finished.append(work)
        return finished

    def progress(self) -> bool:
        """Finish one piece that an mbarrier counts, when no thread can go on. Whether there was one."""
        if not self.free:
            return False
        at = 0
        if self.machine.mode.shuffled:
            at = int(self.machine.random.integers(len(self.free)))
        self.free.pop(at).finish()
        return True

    def finish(self) -> None:
        """The blocks have ended: what is still under way comes to its end."""
        for groups in (*self.groups.values(), self.open.values()):
            for group in groups:
                for work in group:
                    work.finish()
        for work in self.free:
            work.finish()
