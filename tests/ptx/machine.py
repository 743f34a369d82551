"""The machine: the threads of some blocks, what each does next, and what they wait for.

Threads that are at the same instruction execute it together, the lowest first, so that those that
parted meet again. A thread that waits is not picked until what it waits for has come.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .asynchronous import Asynchronous
from .errors import Deadlock, MachineError
from .global_memory import GlobalMemory
from .program import Entry
from .registers import WARP, Active, Registers, active
from .shared_memory import RESERVED, SharedMemory
from .watch import Watch

PLAIN, CONTROL, TOGETHER = 0, 1, 2  # kinds of step, added: TOGETHER needs whole warps
_NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Step:
    """One decoded instruction. ``run(threads)``; of kind CONTROL it says itself where they go."""

    run: Callable[[Active], None]
    kind: int = PLAIN


@dataclass(frozen=True)
class Mode:
    """How a launch is executed. Asynchronous work is done when it is started (``early``), or when
    it is waited for (``late``). ``shuffled`` picks warps at random, with a seed."""

    late: bool = False
    shuffled: bool = False
    seed: int = 0


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

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def shared_bytes(self) -> int:
        static = max((v.offset + v.size for v in self.entry.shared), default=0)
        return static + self.dynamic


class Machine:
    """``blocks`` blocks of a launch (whole clusters) that run together."""

    def __init__(self, launch: Launch, blocks: int, mode: Mode, limit: int = 50_000_000):
        from .decode import decode

        self.launch, self.entry, self.mode, self.limit = launch, launch.entry, mode, limit
        self.blocks, self.block_threads = blocks, launch.threads
        self.threads = blocks * launch.threads
        self.warps = self.threads // WARP
        numbers = np.arange(self.threads, dtype=np.int64)
        self.warp_of, self.block_of = numbers // WARP, numbers // launch.threads
        self.registers = Registers(self.entry, self.threads)
        self.specials: dict[str, np.ndarray] = {}
        stride = -(-(launch.shared_bytes + 16) // 128) * 128
        self.watch = Watch(self.warps, blocks * stride)
        self.shared = SharedMemory(blocks, launch.shared_bytes, launch.cluster, self.watch)
        self.memory = launch.memory
        self.parameters = np.frombuffer(launch.parameters + bytes(16), np.uint8)
        self.asynchronous = Asynchronous(self)
        self.barriers: dict = {}
        self.pc = np.zeros(self.threads, np.int32)
        self.ready = np.ones(self.threads, bool)
        self.alive = np.ones(self.threads, bool)
        self.waiting: dict[int, str] = {}  # warp: what it waits for
        self.hits = np.zeros(len(self.entry.code), np.int64)
        self.random = np.random.default_rng(mode.seed)
        self.steps = [decode(self, instruction) for instruction in self.entry.code]
        self.kinds = np.array([step.kind for step in self.steps] + [CONTROL])
        self.stops = np.flatnonzero(self.kinds != PLAIN)

    # ---- running

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
        from .specials import fill

        fill(self, first)
        self.watch.reset()
        self.shared.reset()
        self.barriers.clear()
        self.waiting.clear()
        self.asynchronous.reset()
        self.pc.fill(0)
        self.ready.fill(True)
        self.alive.fill(True)
        self.executed = 0

    def _pick(self) -> tuple[int, Active, int] | None:
        """(pc, threads there, the next pc above where others are), or None."""
        pcs = np.where(self.ready, self.pc, _NEVER)
        if self.mode.shuffled:
            pcs = self._one_warp(pcs)
        places = np.unique(pcs)
        for n, place in enumerate(places):
            if place == _NEVER:
                return None
            here = np.flatnonzero(pcs == place)
            if self.kinds[place] & TOGETHER:
                here = self._whole_warps(here)
            if len(here):
                return (
                    int(place),
                    active(here),
                    int(places[n + 1]) if n + 1 < len(places) else _NEVER,
                )
        return None

    def _one_warp(self, pcs: np.ndarray) -> np.ndarray:
        """The places of one warp that can go on, chosen at random; nobody's where there is none."""
        warps = np.unique(self.warp_of[pcs != _NEVER])
        for warp in self.random.permutation(warps):
            mine = np.where(self.warp_of == warp, pcs, _NEVER)
            for place in np.unique(mine):
                if place == _NEVER:
                    break
                here = np.flatnonzero(mine == place)
                if not self.kinds[place] & TOGETHER or len(self._whole_warps(here)):
                    return mine
        return np.full_like(pcs, _NEVER)

    def _whole_warps(self, threads: np.ndarray) -> np.ndarray:
        """Those of ``threads`` whose warp is there wholly, but for threads that have ended."""
        here = np.bincount(self.warp_of[threads], minlength=self.warps)
        alive = self.alive.reshape(-1, WARP).sum(axis=1)
        return threads[here[self.warp_of[threads]] == alive[self.warp_of[threads]]]

    def _execute(self, pc: int, threads: Active, limit: int) -> None:
        """Execute from ``pc`` until the threads part, wait, or come to where others are."""
        steps, kinds = self.steps, self.kinds
        here = self.pc[threads]
        warps = len(np.unique(self.warp_of[threads]))
        whole = None
        while True:
            stop = min(
                int(self.stops[np.searchsorted(self.stops, pc)])
                if pc <= self.stops[-1]
                else len(steps),
                limit,
            )
            if stop > pc:
                self._straight(pc, stop, threads)
                self._count(pc, stop, warps)
                pc = stop
                if pc == limit:
                    break
            if pc >= len(steps):
                raise MachineError("a thread runs past the last instruction", self.entry.code[-1])
            if kinds[pc] & TOGETHER:
                if whole is None:
                    numbers = np.arange(self.threads)[threads]
                    whole = len(self._whole_warps(numbers)) == len(numbers)
                if not whole:
                    break
            self._count(pc, pc + 1, warps)
            if kinds[pc] & CONTROL:
                self.pc[threads] = pc
                self._straight(pc, pc + 1, threads)
                return
            self._straight(pc, pc + 1, threads)
            pc += 1
            if pc == limit:
                break
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
        self.hits[pc:stop] += warps
        self.executed += (stop - pc) * warps
        if self.executed > self.limit:
            raise Deadlock(
                f"{self.limit} instructions of warps were executed, the limit. {self._states()}",
                self.entry.code[pc],
            )

    # ---- what CONTROL steps say

    def go_on(self, threads: Active) -> None:
        """Threads go to the next instruction."""
        self.pc[threads] += 1

    def jump(self, threads: Active, pc: int) -> None:
        """Threads go to ``pc``."""
        self.pc[threads] = pc

    def wait(self, threads: Active, reason: str) -> None:
        """Threads stay where they are until ``wake``."""
        self.ready[threads] = False
        for warp in np.unique(self.warp_of[threads]):
            self.waiting[int(warp)] = reason

    def wake(self, threads: np.ndarray) -> None:
        """Threads may go on."""
        self.ready[threads] = self.alive[threads]
        for warp in np.unique(self.warp_of[threads]):
            self.waiting.pop(int(warp), None)

    def end(self, threads: Active) -> None:
        """Threads have ended."""
        self.ready[threads] = False
        self.alive[threads] = False

    def threads_of(self, warps: np.ndarray) -> np.ndarray:
        """The numbers of the threads of warps."""
        return (np.asarray(warps)[:, None] * WARP + np.arange(WARP)).ravel()

    def shared_slice(self, block: int) -> slice:
        """The bytes of a block in shared memory."""
        return slice(block * self.shared.stride, (block + 1) * self.shared.stride)

    def symbol(self, name: str) -> int | None:
        """The address of a variable in shared memory."""
        if name == self.entry.dynamic:
            used = max((v.offset + v.size for v in self.entry.shared), default=0)
            return RESERVED + -(-used // 16) * 16
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
