"""Who accessed which shared byte, and whether that was in an order: vector clocks over warps.

An *agent* is a warp, or the asynchronous work of one kind that a warp has started (copies,
products, bulk stores), or the bulk loads that one mbarrier counts. ``clocks[w, a]`` is how much of
agent ``a`` warp ``w`` knows to be done. Barriers, and waits for asynchronous work, are what it
learns by. Two accesses to a byte, one of them a write, must be known to each other.

The asynchronous proxy (bulk copies, wgmma) sees a warp's ordinary writes only where they were
fenced: ``fenced[w, a]`` is how much of ``a``'s writes ``w`` knows to be fenced. What ``cp.async``
wrote needs no fence here: Triton emits none between cp.async and wgmma.

Most accesses follow a barrier of the whole block, so a byte has four flags of what happened since:
where none is in the way an access is noted in a journal and no clock is read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
    WRITES,
    WROTE,
)  # fmt: skip
from .journal import Journal, rows_of

COPY, PRODUCT, BULK_STORE = 1, 2, 3  # kinds of asynchronous work of a warp
_BARRIERS = 128


@dataclass
class Knowledge:
    """What a warp knew at a moment, (agents,) each."""

    clocks: np.ndarray
    fenced: np.ndarray

    def join(self, other: "Knowledge") -> None:
        np.maximum(self.clocks, other.clocks, out=self.clocks)
        np.maximum(self.fenced, other.fenced, out=self.fenced)


class Watch:
    """The accesses to ``size`` bytes of ``blocks`` blocks by ``warps`` warps."""

    def __init__(self, warps: int, size: int, blocks: int = 1):
        self.warps, self.size, self.blocks = warps, size, blocks
        self.agents = 4 * warps + _BARRIERS
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
        self.clocks = np.zeros((self.warps, self.agents), np.int32)
        self.clocks[np.arange(self.warps), np.arange(self.warps)] = 1
        self.fenced = np.zeros_like(self.clocks)
        self.started = np.zeros(self.agents, np.int32)
        self.flags.fill(0)
        self.writer.fill(-1)
        self.write_clock.fill(0)
        self.read_clock: dict[int, np.ndarray] = {}
        self.journal = Journal(self)
        self._barrier_agents: dict[int, int] = {}

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

    def agent(self, warp: int, kind: int) -> int:
        """The agent of a warp's asynchronous work."""
        return kind * self.warps + warp

    def barrier_agent(self, barrier: int) -> int:
        """The agent of the bulk loads that the mbarrier at an index counts."""
        count = len(self._barrier_agents)
        if barrier not in self._barrier_agents and count == _BARRIERS:
            raise Race(f"more than {_BARRIERS} mbarriers count bulk loads")
        return self._barrier_agents.setdefault(barrier, 4 * self.warps + count)

    def start(self, agent: int) -> int:
        """The number of a new piece of an agent's work."""
        self.started[agent] += 1
        return int(self.started[agent])

    def read_later(
        self, at: np.ndarray, agent: int, number: int, known: Knowledge, fence: bool
    ) -> None:
        """Work ``number`` of an agent will read bytes. It began when a warp knew ``known``; ``fence``
        where it reads through the asynchronous proxy."""
        self._known_to(at, known, agent, fence, "reads")
        self.reads_of(agent)[at] = number
        self.flags[at] |= READS

    def read_units_later(
        self, units: np.ndarray, agent: int, number: int, known: Knowledge
    ) -> None:
        """``read_later`` of units of 16 bytes, by their numbers, through the asynchronous proxy.
        Mostly each unit was written at once."""
        self.journal.settle(reads=False)
        writer = self.writer.reshape(-1, 16).take(units, axis=0)
        clock = self.write_clock.reshape(-1, 16).take(units, axis=0)
        one, latest = writer[:, 0], clock[:, 0]
        unknown = known.clocks[one] < latest
        unknown |= (one < self.warps) & (known.fenced[one] < latest)
        if unknown.any() or (writer != one[:, None]).any() or (clock != latest[:, None]).any():
            at = (units[:, None] * 16 + np.arange(16)).ravel()
            self._known_to(at, known, agent, True, "reads")
        self.reads_of(agent).reshape(-1, 16)[units] = number
        flags = self._flags[16]
        flags[units] = (flags[units].view("u8") | MASKS[READS, 8]).view("c16")

    def write_later(self, at: np.ndarray, agent: int, number: int, known: Knowledge) -> None:
        """Work ``number`` of an agent will write bytes."""
        self._known_to(at, known, agent, False, "writes")
        if (self.flags[at] & SOME_READ).any():
            self.journal.settle()
            for reader, clock in self.read_clock.items():
                wrong = known.clocks[reader] < clock[at]
                if reader != agent and wrong.any():
                    self._race(int(at[wrong][0]), self._name(agent), "writes", reader, "read")
                clock[at] = 0
        self.flags[at] = WRITES
        self.journal.late(at, 1, *(np.broadcast_to(np.int64(n), at.shape) for n in (agent, number)))

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

    def learn_copies(self, warps: np.ndarray, numbers: np.ndarray) -> None:
        """Threads of warps (n,) waited for their ``cp.async`` up to ``numbers``."""
        np.maximum.at(self.clocks, (warps, warps + COPY * self.warps), numbers)

    def _known_to(
        self, at: np.ndarray, known: Knowledge, agent: int, fence: bool, verb: str
    ) -> None:
        self.journal.settle(reads=False)
        writer = self.writer[at]
        wrong = (writer >= 0) & (writer != agent) & (known.clocks[writer] < self.write_clock[at])
        if wrong.any():
            n = int(np.flatnonzero(wrong)[0])
            self._race(int(at[n]), self._name(agent), verb, int(writer[n]), "wrote")
        if fence:
            plain = (writer >= 0) & (writer < self.warps)
            wrong = plain & (known.fenced[writer] < self.write_clock[at])
            if wrong.any():
                n = int(np.flatnonzero(wrong)[0])
                raise Race(
                    f"{self._name(agent)} reads byte {int(at[n])} of shared memory, which"
                    f" {self._name(int(writer[n]))} wrote, without fence.proxy.async between"
                )

    # ---- what warps learn

    def knowledge(self, warp: int) -> Knowledge:
        """What a warp knows now."""
        return Knowledge(self.clocks[warp].copy(), self.fenced[warp].copy())

    def release(self, warp: int) -> Knowledge:
        """What others learn from a warp that arrives; what it does next is later."""
        known = self.knowledge(warp)
        self.clocks[warp, warp] += 1
        return known

    def acquire(self, warp: int, known: Knowledge) -> None:
        """A warp learns."""
        np.maximum(self.clocks[warp], known.clocks, out=self.clocks[warp])
        np.maximum(self.fenced[warp], known.fenced, out=self.fenced[warp])

    def learn(self, warp: int, agent: int, number: int) -> None:
        """A warp waited for an agent's work up to ``number``."""
        self.clocks[warp, agent] = max(int(self.clocks[warp, agent]), number)

    def meet(self, warps: np.ndarray, whole: slice | None = None) -> None:
        """Warps met at a barrier; ``whole``: the bytes of a block all of whose warps these are."""
        self.clocks[warps] = self.clocks[warps].max(axis=0)
        self.fenced[warps] = self.fenced[warps].max(axis=0)
        self.clocks[warps, warps] += 1
        if whole is not None:
            self.flags[whole] &= WRITES | READS
            self.journal.passed(np.array([whole.start // self.stride]))

    def meet_blocks(self, whole: bool) -> None:
        """All warps of each block met; ``whole`` where no other block uses its shared memory."""
        for known in (self.clocks, self.fenced):
            blocks = known.reshape(self.blocks, self.each, self.agents)
            blocks[:] = blocks.max(axis=1, keepdims=True)
        self.clocks[np.arange(self.warps), np.arange(self.warps)] += 1
        if whole:
            self.flags &= WRITES | READS
            self.journal.passed(np.arange(self.blocks))

    def fence(self, warps: np.ndarray) -> None:
        """``fence.proxy.async``: what these warps know is fenced."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.clocks[warps])

    def _name(self, agent: int) -> str:
        kinds = ("warp", "cp.async of warp", "wgmma of warp", "bulk store of warp")
        if agent < 4 * self.warps:
            return f"{kinds[agent // self.warps]} {agent % self.warps}"
        return "a bulk load"

    def _race(self, byte: int, one: str, verb: str, other: int, did: str) -> None:
        raise Race(
            f"{one} {verb} byte {byte % self.stride} of the shared memory of block"
            f" {byte // self.stride} of the group, which {self._name(other)} {did}, with no barrier"
            " or wait between"
        )


def _bytes(index: np.ndarray, size: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of accesses, and whose they are."""
    return (index[:, None] + np.arange(size)).ravel(), np.repeat(warps, size)
