"""Clusters of blocks and the registers of a block: PTX ISA 9.7.13.4 (barrier.cluster), 9.7.9.23
(mapa), 9.7.9.24 (getctarank), 9.7.19.5 (setmaxnreg)."""

import numpy as np

from .decode import CONTROL, TOGETHER, Step, opcode
from .errors import BadBarrier, MachineError
from .program import Immediate, Register
from .registers import WARP
from .shared_memory import WINDOW
from .specials import special

FILE = 64 * 1024  # registers of a multiprocessor
_GROUP = 4  # warps of a warpgroup


class ClusterBarrier:
    """The barriers of all clusters of a group. A thread waits for the phase that it arrived in."""

    def __init__(self, machine):
        self.machine = machine
        self.each = machine.block_threads * machine.launch.cluster
        self.cluster_of = machine.numbers // self.each
        self.phase = np.zeros(machine.threads // self.each, np.int64)
        self.arrived = np.zeros(machine.threads, bool)  # in this phase
        self.mine = np.full(
            machine.threads, -1, np.int64
        )  # the phase of an arrival; -1 without one
        self.waiting = np.zeros(machine.threads, bool)
        self.known: dict[int, object] = {}  # cluster: what those know that arrived in this phase
        self.last: dict[int, object] = {}  # and in the one before it

    def arrive(self, threads: np.ndarray, relaxed: bool) -> None:
        if (self.mine[threads] >= 0).any():
            raise BadBarrier("a thread arrives at the cluster's barrier twice without a wait")
        self.mine[threads] = self.phase[self.cluster_of[threads]]
        self.arrived[threads] = True
        for warp in self.machine.warps_of(threads).tolist():
            self._give(warp, relaxed)
        self.look(threads)

    def _give(self, warp: int, relaxed: bool) -> None:
        """What a warp knows; of a relaxed arrival what it knew at its last fence."""
        machine, cluster = self.machine, warp * WARP // self.each
        fenced = machine.states.get(("released", warp))
        known = fenced if relaxed else machine.watch.arrive(warp)
        if known is not None and cluster in self.known:
            self.known[cluster].join(known)
        elif known is not None:
            self.known[cluster] = known

    def look(self, threads: np.ndarray) -> None:
        """Complete the phases of clusters all of whose threads have arrived or ended."""
        for cluster in np.unique(self.cluster_of[threads]).tolist():
            all_ = slice(cluster * self.each, (cluster + 1) * self.each)
            alive = self.machine.alive[all_]
            if not alive.any() or not (self.arrived[all_] | ~alive).all():
                continue
            self.phase[cluster] += 1
            self.arrived[all_] = False
            self.last[cluster] = self.known.pop(cluster, None)
            woken = np.flatnonzero(self.waiting[all_]) + all_.start
            if len(woken):
                self.waiting[woken] = False
                self.machine.wake(woken)

    def wait(self, threads: np.ndarray) -> None:
        if (self.mine[threads] < 0).any():
            raise BadBarrier("a thread waits at the cluster's barrier without an arrival")
        done = self.mine[threads] < self.phase[self.cluster_of[threads]]
        gone, stay = threads[done], threads[~done]
        if len(gone):
            self.mine[gone] = -1
            for warp in self.machine.warps_of(gone).tolist():
                known = self.last.get(warp * WARP // self.each)
                if known is not None:
                    self.machine.watch.acquire(warp, known)
            self.machine.go_on(gone)
        if len(stay):
            self.waiting[stay] = True
            self.machine.wait(stay, "the barrier of the cluster")


def _cluster_barrier(machine) -> ClusterBarrier:
    if "cluster" not in machine.states:
        machine.states["cluster"] = ClusterBarrier(machine)
    return machine.states["cluster"]


@opcode("barrier")
def build_cluster_barrier(machine, instruction):
    """``barrier.cluster.arrive[.release|.relaxed][.aligned]``, ``.wait[.acquire][.aligned]``"""
    if instruction.modifiers[:1] != ("cluster",):
        return None
    what, *rest = instruction.modifiers[1:]
    aligned = rest[-1:] == ["aligned"]
    order = rest[:-1] if aligned else rest
    if instruction.operands or order not in ([], *_CLUSTER_ORDERS.get(what, ())):
        return None
    if what == "arrive":

        def ended(threads) -> None:
            if "cluster" in machine.states:
                machine.states["cluster"].look(threads)

        machine.on_end.append(ended)

        def run(threads) -> None:
            _cluster_barrier(machine).arrive(machine.numbers[threads], order == ["relaxed"])
            machine.go_on(threads)
    elif what == "wait":

        def run(threads) -> None:
            _cluster_barrier(machine).wait(machine.numbers[threads])
    else:
        return None
    return Step(run, CONTROL | (TOGETHER if aligned else 0))


_CLUSTER_ORDERS = {"arrive": (["release"], ["relaxed"]), "wait": (["acquire"],)}


@opcode("mapa")
def build_map(machine, instruction):
    """``mapa.shared::cluster.u32|u64 d, a, rank``: the address of a in the block of a rank"""
    type_ = instruction.type
    if instruction.modifiers != ("shared::cluster", type_) or type_ not in ("u32", "u64"):
        return None
    registers, cluster = machine.registers, machine.launch.cluster
    d, a, rank = instruction.operands
    result = registers.result(d, type_)
    if isinstance(a, (Register, Immediate)):
        address = registers.source(a, type_)
    else:
        address = registers.constant(machine.symbol(a.name), type_)
    rank = registers.source(rank, "u32")
    window = result.dtype.type(WINDOW)

    def run(threads) -> None:
        block = rank[threads]
        if (block >= cluster).any():
            raise MachineError(f"block {int(block.max())} is not in a cluster of {cluster}")
        result[threads] = (block.astype(result.dtype) + 1) * window + address[threads] % window

    return Step(run)


@opcode("getctarank")
def build_rank(machine, instruction):
    """``getctarank.shared::cluster.u32|u64 d, a``: the rank of the block that an address is of"""
    type_ = instruction.type
    if instruction.modifiers != ("shared::cluster", type_) or type_ not in ("u32", "u64"):
        return None
    d, a = instruction.operands
    result, address = machine.registers.result(d, "u32"), machine.registers.source(a, type_)
    own = special(machine, "%cluster_ctarank")

    def run(threads) -> None:
        window = (address[threads] // WINDOW).astype(np.int64)
        result[threads] = np.where(window == 0, own[threads], window - 1)

    return Step(run)


class RegisterFile:
    """How many registers a thread of each warp holds, and which changes each warp has made."""

    def __init__(self, machine):
        self.machine = machine
        self.each = machine.warps // machine.blocks
        start = min(FILE // machine.block_threads // 8 * 8, 256)
        self.pool = start * machine.block_threads
        self.held = np.full(machine.warps, start, np.int64)
        self.waiting: list[np.ndarray] = []
        self.changes: dict[int, list[int]] = {}

    def change(self, threads, count: int, more: bool, pc: int) -> None:
        machine = self.machine
        warps = machine.warps_of(threads)
        if (self.held[warps] > count).any() if more else (self.held[warps] < count).any():
            held = int(self.held[warps[0]])
            verb = "inc" if more else "dec"
            raise MachineError(f"setmaxnreg.{verb} to {count} registers; a thread holds {held}")
        for warp in warps.tolist():
            self._one(warp, count, pc)

    def _one(self, warp: int, count: int, pc: int) -> None:
        machine, block = self.machine, warp // self.each
        threads = machine.threads_of(np.array([warp]))
        threads = threads[machine.alive[threads]]
        mine = slice(block * self.each, (block + 1) * self.each)
        used = int(self.held[mine].sum() - self.held[warp] + count) * WARP
        if used > self.pool:
            self.waiting.append(threads)
            machine.wait(
                threads,
                f"setmaxnreg.inc to {count} registers, which makes {used} of a block's {self.pool}",
            )
            return
        self.held[warp] = count
        self.changes.setdefault(warp, []).append(pc)
        machine.go_on(threads)
        woken, self.waiting = self.waiting, []
        for others in woken:
            machine.wake(others)

    def ended(self, threads) -> None:
        """A warpgroup that has ended: its warps must have made the same changes."""
        machine = self.machine
        alive = machine.alive.reshape(-1, WARP).any(axis=1)
        for group in np.unique(machine.warps_of(threads) // _GROUP).tolist():
            warps = range(group * _GROUP, min((group + 1) * _GROUP, machine.warps))
            made = [self.changes.get(warp, []) for warp in warps]
            if not alive[list(warps)].any() and any(m != made[0] for m in made):
                raise BadBarrier(
                    f"the warps {warps[0]} to {warps[-1]} of a warpgroup did not all execute the"
                    " same setmaxnreg"
                )


@opcode("setmaxnreg")
def build_register_count(machine, instruction):
    """``setmaxnreg.inc|dec.sync.aligned.u32 n``: inc waits until the block has as many left"""
    modifiers = instruction.modifiers
    if modifiers not in ((a, "sync", "aligned", "u32") for a in ("inc", "dec")):
        return None
    (operand,) = instruction.operands
    count = operand.value
    if not 24 <= count <= 256 or count % 8:
        raise MachineError(f"{count} registers a thread: wanted a multiple of 8 from 24 to 256")
    pc, more = machine.entry.code.index(instruction), modifiers[0] == "inc"

    def file() -> RegisterFile:
        if "registers" not in machine.states:
            machine.states["registers"] = RegisterFile(machine)
        return machine.states["registers"]

    def ended(threads) -> None:
        if "registers" in machine.states:
            machine.states["registers"].ended(threads)

    if not any(getattr(f, "registers_ended", False) for f in machine.on_end):
        ended.registers_ended = True
        machine.on_end.append(ended)
    return Step(lambda threads: file().change(threads, count, more, pc), CONTROL | TOGETHER)
