"""Who accessed which shared byte, and whether that was in an order: vector clocks over warps.

An *agent* is a warp, or the asynchronous work of one kind that a warp has started (copies,
products, bulk stores), or the bulk loads that one mbarrier counts. ``clocks[w, a]`` is how much of
agent ``a`` warp ``w`` knows to be done. Barriers, and waits for asynchronous work, are what it
learns by. Two accesses to a byte, one of them a write, must be known to each other.

The asynchronous proxy (bulk copies, wgmma) sees a warp's ordinary writes only where they were
fenced: ``fenced[w, a]`` is how much of ``a``'s writes ``w`` knows to be fenced. What ``cp.async``
wrote needs no fence here: Triton emits none between cp.async and wgmma.
"""

from dataclasses import dataclass

import numpy as np

from .errors import Race

COPY, PRODUCT, BULK_STORE = 1, 2, 3  # kinds of asynchronous work of a warp
_BARRIERS = 128
_ALWAYS = np.iinfo(np.int64).max  # the time of an access that no barrier of a block orders


@dataclass
class Knowledge:
    """What a warp knew at a moment, (agents,) each."""

    clocks: np.ndarray
    fenced: np.ndarray

    def join(self, other: "Knowledge") -> None:
        np.maximum(self.clocks, other.clocks, out=self.clocks)
        np.maximum(self.fenced, other.fenced, out=self.fenced)


class Watch:
    """The accesses to ``size`` bytes by ``warps`` warps."""

    def __init__(self, warps: int, size: int):
        self.warps, self.size = warps, size
        self.agents = 4 * warps + _BARRIERS
        self.reset()

    def reset(self) -> None:
        """As before the first access."""
        self.clocks = np.zeros((self.warps, self.agents), np.int32)
        self.clocks[np.arange(self.warps), np.arange(self.warps)] = 1
        self.fenced = np.zeros_like(self.clocks)
        self.started = np.zeros(self.agents, np.int32)
        self.writer = np.full(self.size, -1, np.int16)
        self.write_clock = np.zeros(self.size, np.int32)
        self.write_time = np.zeros(self.size, np.int64)
        self.read_time = np.zeros(self.size, np.int64)
        self.read_clock: dict[int, np.ndarray] = {}
        self.time = 1
        self.ordered = np.zeros(self.size, np.int64)  # the time of the block's last full barrier
        self._barrier_agents: dict[int, int] = {}

    # ---- accesses of warps

    def read(self, each: np.ndarray, warps: np.ndarray) -> None:
        """Warps (n,) read bytes (n, width)."""
        at, who = each.ravel(), np.repeat(warps, each.shape[1])
        risky = self.write_time[at] > self.ordered[at]
        if risky.any():
            self._after_writes(at[risky], who[risky], "reads")
        self._note_reads(at, who)
        self.read_time[at] = np.maximum(self.read_time[at], self.time)
        self.time += 1

    def write(self, each: np.ndarray, warps: np.ndarray, same: np.ndarray | None = None) -> None:
        """Warps (n,) write bytes (n, width). ``same`` (n, width): what is there already, which any
        number of warps may write."""
        at, who = each.ravel(), np.repeat(warps, each.shape[1])
        ordered = self.ordered[at]
        risky = (self.write_time[at] > ordered) | (self.read_time[at] > ordered)
        if risky.any():
            differs = risky if same is None else risky & ~same.ravel()
            self._after_writes(at[differs], who[differs], "writes")
            self._after_reads(at[risky], who[risky])
        self.writer[at] = who
        self.write_clock[at] = self.clocks[who, who]
        self.write_time[at] = self.time
        self.time += 1

    def _note_reads(self, at: np.ndarray, who: np.ndarray) -> None:
        for warp in np.unique(who):
            here = at[who == warp]
            self._reads_of(int(warp))[here] = self.clocks[warp, warp]

    def _reads_of(self, agent: int) -> np.ndarray:
        if agent not in self.read_clock:
            self.read_clock[agent] = np.zeros(self.size, np.int32)
        return self.read_clock[agent]

    def _after_writes(self, at: np.ndarray, who: np.ndarray, verb: str) -> None:
        """Race unless warps ``who`` know the writes that are at these bytes."""
        writer = self.writer[at]
        wrong = (writer >= 0) & (self.clocks[who, writer] < self.write_clock[at])
        if wrong.any():
            n = int(np.flatnonzero(wrong)[0])
            self._race(int(at[n]), self._name(int(who[n])), verb, int(writer[n]), "wrote")

    def _after_reads(self, at: np.ndarray, who: np.ndarray) -> None:
        for agent, clock in self.read_clock.items():
            wrong = self.clocks[who, agent] < clock[at]
            if wrong.any():
                n = int(np.flatnonzero(wrong)[0])
                self._race(int(at[n]), self._name(int(who[n])), "writes", agent, "read")

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
        self._reads_of(agent)[at] = number
        self.read_time[at] = _ALWAYS

    def write_later(self, at: np.ndarray, agent: int, number: int, known: Knowledge) -> None:
        """Work ``number`` of an agent will write bytes."""
        self._known_to(at, known, agent, False, "writes")
        for reader, clock in self.read_clock.items():
            wrong = known.clocks[reader] < clock[at]
            if reader != agent and wrong.any():
                self._race(int(at[wrong][0]), self._name(agent), "writes", reader, "read")
        self.writer[at] = agent
        self.write_clock[at] = number
        self.write_time[at] = _ALWAYS

    def _known_to(
        self, at: np.ndarray, known: Knowledge, agent: int, fence: bool, verb: str
    ) -> None:
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
            self.ordered[whole] = self.time
            self.time += 1

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
            f"{one} {verb} byte {byte} of shared memory, which {self._name(other)} {did}, with no"
            " barrier or wait between"
        )
