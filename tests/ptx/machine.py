"""The machine: the threads of some blocks, what each does next, and what they wait for.

Threads that are at the same instruction execute it together, the lowest first, so that those that
parted meet again. A thread that waits is not picked until what it waits for has come.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .asynchronous import Asynchronous
from .calls import Calls
from .decode import CONTROL, PLAIN, TOGETHER, decode
from .errors import Deadlock, MachineError
from .global_memory import GlobalMemory
from .program import Entry
from .registers import WARP, Active, Registers, active
from .shared_memory import RESERVED, SharedMemory
from .specials import fill
from .watch import Watch

_NEVER = np.iinfo(np.int32).max
_REDRAWN = 1 / 64  # how often the order of shuffled warps is drawn again


@dataclass(frozen=True)
class Mode:
    """How a launch is executed. Asynchronous work is done when it is started (``early``), or when
    it is waited for (``late``). ``shuffled`` picks warps at random, with a seed."""

    late: bool = False
    shuffled: bool = False
    seed: int = 0


EARLY, LATE = Mode(), Mode(late=True)


@dataclass
class Launch:
    """What is launched: ``parameters`` is the parameter memory."""

    entry: Entry
    grid: tuple[int, int, int]
    threads: int
    parameters: bytes
    dynamic: int = 0
    cluster: int = 1
    memory: GlobalMemory = field(default_factory=GlobalMemory)
    dtype: str = ""  # of its floats, for reports
    keep: object = None  # what must live as long as the launch

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def shared_bytes(self) -> int:
        if not self.dynamic:
            return self.entry.static_bytes
        return self.entry.dynamic_offset + self.dynamic


class Machine:
    """``blocks`` blocks of a launch (whole clusters) that run together."""

    limit = 50_000_000  # of instructions of warps, for a program that does not end

    def __init__(self, launch: Launch, blocks: int, mode: Mode):
        self.launch, self.entry, self.mode = launch, launch.entry, mode
        self.blocks, self.block_threads = blocks, launch.threads
        self.threads = blocks * launch.threads
        self.warps = self.threads // WARP
        self.numbers = numbers = np.arange(self.threads, dtype=np.int64)
        self.warp_of, self.block_of = numbers // WARP, numbers // launch.threads
        self.rank = self.warp_of % (launch.cluster * launch.threads // WARP)
        self.registers = Registers(self.entry, self.threads)
        self.specials: dict[str, np.ndarray] = {}
        stride = -(-(launch.shared_bytes + 16) // 128) * 128
        self.watch = Watch(self.warps, blocks * stride, blocks)
        self.watch.proxies = any(
            i.root == "wgmma" or "bulk" in i.modifiers for i in self.entry.code
        )
        self.shared = SharedMemory(blocks, launch.shared_bytes, launch.cluster, self.watch)
        self.memory = GlobalMemory()
        self.parameters = np.zeros(len(launch.parameters) + 16, np.uint8)
        self.asynchronous = Asynchronous(self)
        self.calls = Calls(self)
        self.states: dict = {}  # what a family of opcodes keeps, by its own keys
        self.mbarriers: dict = {}  # by the index of their first byte in shared memory
        self.pc = np.zeros(self.threads, np.int32)
        self.ready = np.ones(self.threads, bool)
        self.alive = np.ones(self.threads, bool)
        self.ended = False  # whether any thread has
        self.on_end: list[Callable[[np.ndarray], None]] = []  # called with threads that have ended
        self.waiting: dict[int, str] = {}  # warp: what it waits for
        self._runs: dict[tuple[int, int], int] = {}  # warps that executed from one pc to another
        self.random = np.random.default_rng(mode.seed)
        self.order = np.zeros(0, np.int64)  # of warps, where shuffled
        self.steps = [decode(self, instruction) for instruction in self.entry.code]
        self.kinds = [step.kind for step in self.steps] + [CONTROL]
        self.together = [bool(kind & TOGETHER) for kind in self.kinds]
        self.next_stop = self._stops()
        self.take(launch)

    def take(self, launch: Launch) -> None:
        """Be the machine of another launch of the same entry, grid and sizes: what was decoded
        stays."""
        self.launch = launch
        self.memory.replace(launch.memory)
        self.parameters[: len(launch.parameters)] = np.frombuffer(launch.parameters, np.uint8)
        self.random = np.random.default_rng(self.mode.seed)
        self.order = self._drawn(launch.cluster * launch.threads // WARP)
        self._runs.clear()

    def _stops(self) -> list[int]:
        """For each instruction the first from it on that is not PLAIN."""
        stops, stop = [], len(self.kinds) - 1
        for pc in reversed(range(len(self.kinds))):
            stop = pc if self.kinds[pc] != PLAIN else stop
            stops.append(stop)
        return stops[::-1]

    # ---- running

    @np.errstate(all="ignore")  # infinities and NaNs are what a program may compute
    def run(self, first: int) -> None:
        """Execute blocks ``first`` and on, until all have ended."""
        self._begin(first)
        while True:
            picked = self._pick()
            if picked is not None:
                self._execute(*picked)
            elif not self.alive.any():
                break
            elif not self.asynchronous.progress():
                raise Deadlock(f"no thread can go on. {self._states()}")
        self.asynchronous.finish()

    def _begin(self, first: int) -> None:
        fill(self, first)
        self.registers.reset()
        self.watch.reset()
        self.shared.reset()
        self.states.clear()
        self.mbarriers.clear()
        self.waiting.clear()
        self.asynchronous.reset()
        self.calls.reset()
        self.pc.fill(self.entry.start)
        self.ready.fill(True)
        self.alive.fill(True)
        self.ended = False
        self.executed = 0

    def _pick(self) -> tuple[int, Active, int] | None:
        """(pc, threads there, the next pc above where others are), or None."""
        pcs = np.where(self.ready, self.pc, _NEVER)
        return self._one_warp(pcs) if self.mode.shuffled else self._lowest(pcs)

    def _lowest(self, pcs: np.ndarray) -> tuple[int, Active, int] | None:
        """Those at the lowest of ``pcs`` that can execute what is there."""
        place = int(pcs.min())
        while place != _NEVER:
            there = pcs == place
            here = np.flatnonzero(there)
            above = _NEVER
            if len(here) < len(pcs):
                above = int(pcs.min(where=pcs > place, initial=_NEVER))
            if self.together[place]:
                here = self.whole_warps(here)
            if len(here):
                return place, active(here), above
            place = above
        return None

    def _one_warp(self, pcs: np.ndarray) -> tuple[int, Active, int] | None:
        """The same of one warp of each cluster, the same in all of them, in a random order: they do
        not meet, so this is as if one warp went on at a time."""
        each = self.launch.cluster * self.block_threads // WARP
        ready = self.ready.reshape(-1, each, WARP).any(axis=(0, 2))
        if self.random.random() < _REDRAWN:
            self.order = self._drawn(each)
        for warp in self.order[ready[self.order]].tolist():
            found = self._lowest(np.where(self.rank == warp, pcs, _NEVER))
            if found is not None:
                return found
        return None

    def _drawn(self, each: int) -> np.ndarray:
        """An order of the warps of a cluster; in half of the cases one block goes before another.
        It is kept for a while: that others overtake a warp by far is what a fair order hides."""
        block = self.random.permutation(self.launch.cluster) * int(self.random.integers(2))
        warp = self.random.random(each)
        return np.lexsort((warp, np.repeat(block, each // self.launch.cluster)))

    def whole_warps(self, threads: np.ndarray) -> np.ndarray:
        """Those of ``threads`` whose warp is there wholly, but for threads that have ended."""
        if len(threads) == self.threads:
            return threads
        warps = self.warp_of[threads]
        here = np.bincount(warps, minlength=self.warps)
        wanted = self.alive.reshape(-1, WARP).sum(axis=1) if self.ended else WARP
        whole = here == wanted
        return threads[whole[warps]]

    def _execute(self, pc: int, threads: Active, limit: int) -> None:
        """Execute from ``pc`` until the threads part, wait, or come to where others are."""
        warps = len(self.warps_of(threads))
        whole = None
        while pc != limit:
            stop = min(self.next_stop[pc], limit)
            if stop > pc:
                self._count(pc, stop, warps)
                self._straight(pc, stop, threads)
                pc = stop
                continue
            if pc >= len(self.steps):
                raise MachineError("a thread runs past the last instruction", self.entry.code[-1])
            if self.together[pc]:
                if whole is None:
                    numbers = self.numbers[threads]
                    whole = len(self.whole_warps(numbers)) == len(numbers)
                if not whole:
                    break
            self._count(pc, pc + 1, warps)
            if self.kinds[pc] & CONTROL:
                self.pc[threads] = pc
                self._straight(pc, pc + 1, threads)
                return
            self._straight(pc, pc + 1, threads)
            pc += 1
        self.pc[threads] = pc

    def _straight(self, pc: int, stop: int, threads: Active) -> None:
        at = pc
        try:
            for at in range(pc, stop):
                self.steps[at].run(threads)
        except MachineError as error:
            if error.instruction is None:
                raise type(error)(str(error), self.entry.code[at]) from None
            raise

    def _count(self, pc: int, stop: int, warps: int) -> None:
        at = (pc, stop)
        self._runs[at] = self._runs.get(at, 0) + warps
        self.executed += (stop - pc) * warps
        if self.executed > self.limit:
            raise Deadlock(
                f"{self.limit} instructions of warps were executed, the limit. {self._states()}",
                self.entry.code[pc],
            )

    @property
    def hits(self) -> np.ndarray:
        """How many warps executed each instruction."""
        found = np.zeros(len(self.entry.code), np.int64)
        for (first, stop), warps in self._runs.items():
            found[first:stop] += warps
        return found

    # ---- what CONTROL steps say

    def go_on(self, threads: Active) -> None:
        """Threads go to the next instruction."""
        self.pc[threads] += 1

    def jump(self, threads: Active, pc: int | np.ndarray) -> None:
        """Threads go to ``pc``, which may be another for each."""
        self.pc[threads] = pc

    def wait(self, threads: Active, reason: str) -> None:
        """Threads stay where they are until ``wake``."""
        self.ready[threads] = False
        for warp in self.warps_of(threads).tolist():
            self.waiting[warp] = reason

    def wake(self, threads: np.ndarray) -> None:
        """Threads may go on."""
        self.ready[threads] = self.alive[threads]
        for warp in self.warps_of(threads).tolist():
            self.waiting.pop(warp, None)

    def end(self, threads: Active) -> None:
        """Threads have ended."""
        self.ready[threads] = False
        self.alive[threads] = False
        self.ended = True
        for call in self.on_end:
            call(threads)

    def warps_of(self, threads: Active) -> np.ndarray:
        """The warps of threads, which are in order."""
        if isinstance(threads, slice):
            return np.arange(threads.start // WARP, (threads.stop - 1) // WARP + 1)
        warps = self.warp_of[threads]
        first = np.ones(len(warps), bool)
        np.not_equal(warps[1:], warps[:-1], out=first[1:])
        return warps[first]

    def threads_of(self, warps: np.ndarray) -> np.ndarray:
        """The numbers of the threads of warps."""
        return (np.asarray(warps)[:, None] * WARP + np.arange(WARP)).ravel()

    def shared_slice(self, block: int) -> slice:
        """The bytes of a block in shared memory."""
        return slice(block * self.shared.stride, (block + 1) * self.shared.stride)

    def symbol(self, name: str) -> int | None:
        """The address of a variable in shared memory."""
        if name == self.entry.dynamic:
            return RESERVED + self.entry.dynamic_offset
        return next((RESERVED + v.offset for v in self.entry.shared if v.name == name), None)

    def _states(self) -> str:
        """Where each warp is and what it waits for."""
        said = []
        for warp in range(self.warps):
            mine = slice(warp * WARP, (warp + 1) * WARP)
            if not self.alive[mine].any():
                said.append(f"warp {warp} has ended")
                continue
            code = self.entry.code[int(self.pc[mine][self.alive[mine]].min())]
            reason = self.waiting.get(warp, "the rest of its warp")
            said.append(f"warp {warp} waits for {reason} at {code.place}: {code.text}")
        return "; ".join(said)
