"""What each warp knows of the others' accesses: vector clocks.

An *agent* is a warp, or the asynchronous work of one kind that a warp has started (copies,
products, bulk stores), or the bulk loads that one mbarrier counts. ``clocks[w, a]`` is how much of
agent ``a`` warp ``w`` knows to be done. Barriers, and waits for asynchronous work, are what it
learns by.

The asynchronous proxy (bulk copies, wgmma) sees a warp's ordinary writes only where they were
fenced: ``fenced[w, a]`` is how much of ``a``'s writes ``w`` knows to be fenced. What ``cp.async``
wrote needs no fence here: Triton emits none between cp.async and wgmma.
"""

from dataclasses import dataclass

import numpy as np

from .errors import Unsupported

COPY, PRODUCT, BULK_STORE = 1, 2, 3  # kinds of asynchronous work of a warp


@dataclass
class Knowledge:
    """What a warp knew at a moment, (agents,) each."""

    clocks: np.ndarray
    fenced: np.ndarray

    def join(self, other: "Knowledge") -> None:
        np.maximum(self.clocks, other.clocks, out=self.clocks)
        np.maximum(self.fenced, other.fenced, out=self.fenced)


class Clocks:
    """The clocks of ``warps`` warps of ``blocks`` blocks, and of their agents."""

    def __init__(self, warps: int, blocks: int):
        self.warps, self.barriers = warps, max(128, 32 * blocks)
        self.agents = 4 * warps + self.barriers

    def reset(self) -> None:
        """As before the first access."""
        self.clocks = np.zeros((self.warps, self.agents), np.int32)
        self.clocks[np.arange(self.warps), np.arange(self.warps)] = 1
        self.fenced = np.zeros_like(self.clocks)
        self.met = np.zeros(self.warps, np.int32)  # the clock of each warp at its last barrier
        self.started = np.zeros(self.agents, np.int32)
        self._barrier_agents: dict[int, int] = {}

    def agent(self, warp: int, kind: int) -> int:
        """The agent of a warp's asynchronous work."""
        return kind * self.warps + warp

    def barrier_agent(self, barrier: int) -> int:
        """The agent of the bulk loads that the mbarrier at an index counts."""
        count = len(self._barrier_agents)
        if barrier not in self._barrier_agents and count == self.barriers:
            raise Unsupported(f"more than {self.barriers} mbarriers count bulk loads")
        return self._barrier_agents.setdefault(barrier, 4 * self.warps + count)

    def start(self, agent: int) -> int:
        """The number of a new piece of an agent's work."""
        self.started[agent] += 1
        return int(self.started[agent])

    def knowledge(self, warp: int) -> Knowledge:
        """What a warp knows now."""
        return Knowledge(self.clocks[warp].copy(), self.fenced[warp].copy())

    def release(self, warp: int) -> Knowledge:
        """What others learn from a warp that arrives; what it does next is later."""
        known = self.knowledge(warp)
        self.clocks[warp, warp] += 1
        return known

    def arrive(self, warp: int) -> Knowledge:
        """``release`` at a barrier of the block or of the cluster."""
        self.met[warp] = self.clocks[warp, warp]
        return self.release(warp)

    def acquire(self, warp: int, known: Knowledge) -> None:
        """A warp learns."""
        np.maximum(self.clocks[warp], known.clocks, out=self.clocks[warp])
        np.maximum(self.fenced[warp], known.fenced, out=self.fenced[warp])

    def learn(self, warp: int, agent: int, number: int) -> None:
        """A warp waited for an agent's work up to ``number``."""
        self.clocks[warp, agent] = max(int(self.clocks[warp, agent]), number)

    def learn_copies(self, warps: np.ndarray, numbers: np.ndarray) -> None:
        """Threads of warps (n,) waited for their ``cp.async`` up to ``numbers``."""
        np.maximum.at(self.clocks, (warps, warps + COPY * self.warps), numbers)

    def fence(self, warps: np.ndarray) -> None:
        """``fence.proxy.async``: what these warps know is fenced; what they do next is not."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.clocks[warps])
        self.clocks[warps, warps] += 1

    def _name(self, agent: int) -> str:
        kinds = ("warp", "cp.async of warp", "wgmma of warp", "bulk store of warp")
        if agent < 4 * self.warps:
            return f"{kinds[agent // self.warps]} {agent % self.warps}"
        return "a bulk load"
