"""Who accessed which shared byte, and whether that was in an order.

Two accesses to a byte, one of them a write, must be known to each other: clocks.py says what a warp
knows. Most accesses follow a barrier of the whole block, so a byte has four flags of what happened
since: where none is in the way an access is noted in a journal and no clock is read.
"""

from collections.abc import Callable

import numpy as np

from .clocks import COPY, Clocks, Knowledge
from .errors import Race
from .flags import (
    CARRIED,
    MASKS,
    ONLY_WRITES,
    ONLY_WROTE,
    READ,
    READS,
    SOME_READ,
    SOME_WRITE,
    UNIT,
    WRITES,
    WROTE,
)  # fmt: skip
from .journal import Journal, rows_of


class Watch(Clocks):
    """The accesses to ``size`` bytes of ``blocks`` blocks by ``warps`` warps."""

    def __init__(self, warps: int, size: int, blocks: int = 1):
        super().__init__(warps, blocks)
        self.size, self.blocks = size, blocks
        self.stride, self.each = size // blocks, warps // blocks
        # whether asynchronous work may read what was written before a barrier without a fence
        self.proxies = True
        self.flags = np.zeros(size, np.uint8)
        self._flags = {
            n: self.flags[: size // n * n].view(kind) for n, kind in CARRIED.items() if size >= n
        }
        self.writer = np.full(size, -1, np.int16)
        self.write_clock = np.zeros(size, np.int32)
        self._owners: dict[int, np.ndarray] = {}
        self.reset()

    def reset(self) -> None:
        """As before the first access."""
        super().reset()
        self.flags.fill(0)
        self.writer.fill(-1)
        self.write_clock.fill(0)
        self.read_clock: dict[int, np.ndarray] = {}
        self.journal = Journal(self)

    # ---- accesses of warps

    def read(self, each: np.ndarray, warps: np.ndarray) -> None:
        """Warps (n,) read bytes (n, width)."""
        self.read_at(each.ravel(), 1, np.repeat(warps, each.shape[1]))

    def write(self, each: np.ndarray, warps: np.ndarray, same: np.ndarray | None = None) -> None:
        """Warps (n,) write bytes (n, width). ``same`` (n, width): what is there already, which any
        number of warps may write."""
        known = None if same is None else lambda: same.reshape(-1, 1)
        self.write_at(each.ravel(), 1, np.repeat(warps, each.shape[1]), known)

    def read_at(self, index: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Warps (n,) read ``size`` bytes from each index, a multiple of it."""
        view, at = self._flags[size], index // size
        found = view[at]
        flags = found.view("u8") if size == 16 else found
        if int(np.bitwise_or.reduce(flags)) & MASKS[SOME_WRITE, size]:
            self._after_writes(*_bytes(index, size, warps), "reads")
        wanted = flags | flags.dtype.type(MASKS[READ, size])
        view[at] = wanted.view(view.dtype)
        self.journal.add(READ, at, size, warps)

    def write_at(
        self, index: np.ndarray, size: int, warps: np.ndarray,
        same: Callable[[], np.ndarray] | None = None, values: Callable[[], np.ndarray] | None = None,
    ) -> None:  # fmt: skip
        """Warps (n,) write ``size`` bytes from each index, a multiple of it. ``same()`` (n, size) is
        where a byte has the value already, ``values()`` (n, size) are the new ones: warps may write
        the same value at one time."""
        view, at = self._flags[size], index // size
        flags = view[at].view("u8") if size == 16 else view[at]
        if np.count_nonzero(flags):
            self._check_write(index, size, warps, same)
        if warps[0] != warps[-1]:
            self._check_together(at, size, warps, values)
        view[at] = ONLY_WROTE[size]
        self.journal.add(WROTE, at, size, warps)

    def _check_write(self, index, size, warps, same) -> None:
        at, who = _bytes(index, size, warps)
        flags = self.flags[at]
        written = (flags & SOME_WRITE) > 0
        if written.any():
            if same is not None:
                written &= ~same().ravel() | ((flags & WRITES) > 0)  # work may still overwrite it
            self._after_writes(at[written], who[written], "writes")
        read = (flags & SOME_READ) > 0
        if read.any():
            self._after_reads(at[read], who[read])

    def _check_together(self, at, size, warps, values) -> None:
        """Race where two warps write other values to the same bytes with one instruction."""
        if size not in self._owners:
            self._owners[size] = np.zeros(self.size // size, np.int32)
        owner = self._owners[size]
        owner[at] = warps
        other = owner[at] != warps
        if not np.count_nonzero(other):
            return
        owner[at] = np.arange(len(at))
        winner = owner[at]
        if values is not None:
            new = values()
            other &= (new != new[winner]).any(axis=1)
        if other.any():
            n = int(np.flatnonzero(other)[0])
            self._race(
                int(at[n]) * size,
                self._name(int(warps[n])),
                "writes",
                int(warps[winner[n]]),
                "wrote",
            )

    def reads_of(self, agent: int) -> np.ndarray:
        """How much of an agent's work had read each byte."""
        if agent not in self.read_clock:
            self.read_clock[agent] = np.zeros(self.size, np.int32)
        return self.read_clock[agent]

    def _after_writes(self, at: np.ndarray, who: np.ndarray, verb: str) -> None:
        """Race unless warps ``who`` know the writes that are at these bytes."""
        self.journal.settle(reads=False)
        writer = self.writer[at]
        wrong = (writer >= 0) & (self.clocks[who, writer] < self.write_clock[at])
        if wrong.any():
            n = int(np.flatnonzero(wrong)[0])
            self._race(int(at[n]), self._name(int(who[n])), verb, int(writer[n]), "wrote")

    def _after_reads(self, at: np.ndarray, who: np.ndarray, kind: int = 0) -> None:
        """Race unless warps ``who`` know the reads; ``kind``: of its agent that writes, added.
        The write that follows is what later ones are to know."""
        self.journal.settle()
        for agent, clock in self.read_clock.items():
            wrong = self.clocks[who, agent] < clock[at]
            if wrong.any():
                n = int(np.flatnonzero(wrong)[0])
                self._race(int(at[n]), self._name(int(who[n]) + kind), "writes", agent, "read")
            clock[at] = 0

    # ---- accesses of asynchronous work

    def read_later(self, at: np.ndarray, agent: int, number: int, known: Knowledge) -> None:
        """Work ``number`` of an agent will read bytes through the asynchronous proxy. It began when
        a warp knew ``known``."""
        self._check_fenced(at, known, agent)
        self.reads_of(agent)[at] = number
        self.flags[at] |= READS

    def read_units_later(
        self, units: np.ndarray, agent: int, number: int, known: Knowledge
    ) -> None:
        """``read_later`` of units of 16 bytes, by their numbers, through the asynchronous proxy.
        Mostly each unit was written at once."""
        self.journal.settle(reads=False)
        writer = self.writer.reshape(-1, UNIT).take(units, axis=0)
        clock = self.write_clock.reshape(-1, UNIT).take(units, axis=0)
        one, latest = writer[:, 0], clock[:, 0]
        unknown = known.clocks[one] < latest
        unknown |= (one < self.warps) & (known.fenced[one] < latest)
        if unknown.any() or (writer != one[:, None]).any() or (clock != latest[:, None]).any():
            at = (units[:, None] * UNIT + np.arange(UNIT)).ravel()
            self._check_fenced(at, known, agent)
        self.reads_of(agent).reshape(-1, UNIT)[units] = number
        flags = self._flags[16]
        flags[units] = (flags[units].view("u8") | MASKS[READS, 8]).view("c16")

    def write_later(self, span: slice, agent: int, number: int, known: Knowledge) -> None:
        """Work ``number`` of an agent will write whole units of 16 bytes in a row."""
        self.journal.settle(reads=False)
        writer, name = self.writer[span], self._name(agent)
        wrong = (writer >= 0) & (writer != agent) & (known.clocks[writer] < self.write_clock[span])
        if wrong.any():
            n = int(np.flatnonzero(wrong)[0])
            self._race(span.start + n, name, "writes", int(writer[n]), "wrote")
        if (self.flags[span] & SOME_READ).any():
            self.journal.settle()
            for reader, clock in self.read_clock.items():
                wrong = clock[span] > known.clocks[reader]
                if reader != agent and wrong.any():
                    byte = span.start + int(np.flatnonzero(wrong)[0])
                    self._race(byte, name, "writes", reader, "read")
                clock[span] = 0
        self.flags[span] = WRITES
        units = np.arange(span.start // UNIT, span.stop // UNIT)
        agents, numbers = np.full((2, len(units)), [[agent], [number]])
        self.journal.late(units, UNIT, agents, numbers)

    def copy(self, index: np.ndarray, size: int, warps: np.ndarray, numbers: np.ndarray) -> None:
        """``cp.async`` of warps (n,) will write ``size`` bytes from each index, a multiple of it, as
        work ``numbers`` of the warps' agents."""
        at, agents = index // size, warps + COPY * self.warps
        if np.count_nonzero(self._flags[size][at]):
            found = self.flags.reshape(-1, size)[at]
            if (found & SOME_WRITE).any():
                self.journal.settle(reads=False)
                rows = rows_of(self, size)
                self._copies_after_writes(index, warps, rows[0][at], rows[1][at])
            if (found & SOME_READ).any():
                row, byte = np.nonzero(found & SOME_READ)
                self._after_reads(index[row] + byte, warps[row], COPY * self.warps)
        self._flags[size][at] = ONLY_WRITES[size]
        self.journal.late(at, size, agents, numbers)

    def _copies_after_writes(self, index, warps, writer, clock) -> None:
        """Race unless warps (n,) know the writes (n, size). Mostly each copy's bytes have one."""
        one, number = writer[:, :1], clock[:, :1]
        if (writer == one).all() and (clock == number).all():
            writer, clock = one, number
        wrong = (writer >= 0) & (self.clocks[warps[:, None], writer] < clock)
        if wrong.any():
            row, byte = (int(found[0]) for found in np.nonzero(wrong))
            name = self._name(int(warps[row]) + COPY * self.warps)
            self._race(int(index[row]) + byte, name, "writes", int(writer[row, byte]), "wrote")

    def _check_fenced(self, at: np.ndarray, known: Knowledge, agent: int) -> None:
        """Race unless ``known`` has the writes that are at these bytes, and their fences."""
        self.journal.settle(reads=False)
        writer, clock = self.writer[at], self.write_clock[at]
        wrong = (writer >= 0) & (writer != agent) & (known.clocks[writer] < clock)
        if wrong.any():
            n = int(np.flatnonzero(wrong)[0])
            self._race(int(at[n]), self._name(agent), "reads", int(writer[n]), "wrote")
        plain = (writer >= 0) & (writer < self.warps)
        wrong = plain & (known.fenced[writer] < clock)
        if wrong.any():
            n = int(np.flatnonzero(wrong)[0])
            raise Race(
                f"{self._name(agent)} reads byte {int(at[n])} of shared memory, which"
                f" {self._name(int(writer[n]))} wrote, without fence.proxy.async between"
            )

    # ---- what warps learn

    def meet(self, warps: np.ndarray, whole: slice | None = None) -> None:
        """Warps met at a barrier; ``whole``: the bytes of a block all of whose warps these are."""
        self.clocks[warps] = self.clocks[warps].max(axis=0)
        self.fenced[warps] = self.fenced[warps].max(axis=0)
        self.met[warps] = self.clocks[warps, warps]
        self.clocks[warps, warps] += 1
        if whole is not None:
            self.flags[whole] &= WRITES | READS
            self.journal.passed(np.array([whole.start // self.stride]))

    def meet_blocks(self, whole: bool) -> None:
        """All warps of each block met; ``whole`` where no other block uses its shared memory."""
        for known in (self.clocks, self.fenced):
            blocks = known.reshape(self.blocks, self.each, self.agents)
            blocks[:] = blocks.max(axis=1, keepdims=True)
        self.met[:] = self.clocks.diagonal()
        self.clocks[np.arange(self.warps), np.arange(self.warps)] += 1
        if whole:
            self.flags &= WRITES | READS
            self.journal.passed(np.arange(self.blocks))

    def _race(self, byte: int, one: str, verb: str, other: int, did: str) -> None:
        raise Race(
            f"{one} {verb} byte {byte % self.stride} of the shared memory of block"
            f" {byte // self.stride} of the group, which {self._name(other)} {did}, with no barrier"
            " or wait between"
        )


def _bytes(index: np.ndarray, size: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of accesses, and whose they are."""
    return (index[:, None] + np.arange(size)).ravel(), np.repeat(warps, size)
