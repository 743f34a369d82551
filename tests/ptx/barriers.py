"""Barriers of a block: PTX ISA 9.7.13 (bar, barrier, griddepcontrol).

A barrier counts whole warps by its number. What warps did before it is known to those that waited
at it; ``bar.arrive`` gives its knowledge and takes none. The barrier of a cluster is in clusters.py.
"""

import numpy as np

from .decode import CONTROL, TOGETHER, Step, opcode
from .errors import BadBarrier
from .program import Immediate
from .registers import WARP

_NAMES = 16


class Barrier:
    """One number in all blocks of a group: who has arrived since it last was complete."""

    def __init__(self, machine, name: int):
        self.machine, self.name = machine, name
        self.each = machine.warps // machine.blocks  # warps of a block
        self.arrived = np.zeros(machine.warps, bool)
        self.waits = np.zeros(machine.warps, bool)
        self.wanted = np.zeros(machine.blocks, np.int64)  # threads; 0 where nobody has arrived
        self.known: dict[int, object] = {}  # block: what those know that do not wait
        self.reductions: list[tuple] = []

    def arrive(self, warps: np.ndarray, count: int, waits: bool, threads=None) -> None:
        """Whole warps arrive. Those that wait go on when ``count`` threads of their block have."""
        machine = self.machine
        if waits and len(warps) == machine.warps and self._all_at_once(count):
            machine.watch.meet_blocks(machine.launch.cluster == 1)
            machine.go_on(threads)
            return
        self._enter(warps, count)
        if waits:
            self.waits[warps] = True
            machine.wait(threads, f"barrier {self.name} of {count} threads")
        else:
            for warp in warps:
                self._give(int(warp))
        here = self.arrived.reshape(-1, self.each).sum(axis=1) * WARP
        if (here > self.wanted).any():
            block = int(np.flatnonzero(here > self.wanted)[0])
            raise BadBarrier(
                f"{here[block]} threads of block {block} of the group arrive at barrier {self.name}"
                f" of {self.wanted[block]}"
            )
        done = np.flatnonzero((here == self.wanted) & (here > 0))
        if len(done) == machine.blocks and self.waits.all() and not (self.known or self.reductions):
            self._complete_all()
            return
        for block in done.tolist():
            self._complete(block)

    def _complete_all(self) -> None:
        """All warps of all blocks wait, and go on."""
        machine = self.machine
        self.arrived[:] = self.waits[:] = False
        self.wanted[:] = 0
        machine.watch.meet_blocks(machine.launch.cluster == 1)
        threads = np.flatnonzero(machine.alive)
        machine.go_on(threads)
        machine.wake(threads)

    def _all_at_once(self, count: int) -> bool:
        """Whether all warps come together, none of them being there already."""
        machine = self.machine
        return count == machine.block_threads and not self.wanted.any()

    def _enter(self, warps: np.ndarray, count: int) -> None:
        if self.arrived[warps].any():
            warp = int(warps[self.arrived[warps]][0])
            raise BadBarrier(
                f"warp {warp} arrives twice at barrier {self.name} before it is complete"
            )
        blocks = warps // self.each
        other = self.wanted[blocks]
        if ((other > 0) & (other != count)).any():
            raise BadBarrier(
                f"barrier {self.name} is of {count} threads here, and of"
                f" {int(other[(other > 0) & (other != count)][0])} where others wait"
            )
        self.wanted[blocks] = count
        self.arrived[warps] = True

    def _give(self, warp: int) -> None:
        """What a warp knows that does not wait, for those that do."""
        known, block = self.machine.watch.arrive(warp), warp // self.each
        if block in self.known:
            self.known[block].join(known)
        else:
            self.known[block] = known

    def _complete(self, block: int) -> None:
        """The warps of a block that wait go on."""
        machine = self.machine
        mine = slice(block * self.each, (block + 1) * self.each)
        waiting = np.flatnonzero(self.waits[mine]) + mine.start
        if len(waiting):
            known = self.known.pop(block, None)
            if known is not None:
                machine.watch.acquire(int(waiting[0]), known)
            live = machine.alive.reshape(-1, WARP)[mine].any(axis=1)
            whole = not (live & ~self.waits[mine]).any() and machine.launch.cluster == 1
            machine.watch.meet(waiting, machine.shared_slice(block) if whole else None)
            self._reduce(block)
            threads = machine.threads_of(waiting)
            threads = threads[machine.alive[threads]]
            machine.go_on(threads)
            machine.wake(threads)
        self.known.pop(block, None)
        self.arrived[mine] = self.waits[mine] = False
        self.wanted[block] = 0

    def _reduce(self, block: int) -> None:
        """The results of ``bar.red``, over all threads of the block that came with it."""
        mine = [r for r in self.reductions if r[0] == block]
        if mine:
            self.reductions = [r for r in self.reductions if r[0] != block]
            values = np.concatenate([r[2] for r in mine])
            for _, threads, _, function, result in mine:
                result[threads] = function(values)


def barrier(machine, name: int) -> Barrier:
    """The barrier of a number."""
    key = ("bar", name)
    if key not in machine.states:
        if not 0 <= name < _NAMES:
            raise BadBarrier(f"barrier {name}: there are {_NAMES} in a block, from 0")
        machine.states[key] = Barrier(machine, name)
    return machine.states[key]


def _counted(machine, count: int) -> int:
    if count <= 0 or count % WARP or count > machine.block_threads:
        raise BadBarrier(
            f"a barrier of {count} threads: wanted a multiple of {WARP} up to the"
            f" {machine.block_threads} of the block"
        )
    return count


def _parties(machine, name, count):
    """A function from threads to (number, count, threads, warps): one for each number and count.

    ``name`` and ``count`` are operands; a count of None is the whole block.
    """
    fixed = isinstance(name, Immediate) and (count is None or isinstance(count, Immediate))
    if fixed:
        wanted = machine.block_threads if count is None else count.value

        def parties(threads):
            yield name.value, _counted(machine, wanted), threads, machine.warps_of(threads)

        return parties
    names = machine.registers.source(name, "u32")
    counts = None if count is None else machine.registers.source(count, "u32")

    def parties(threads):
        mine = machine.numbers[threads]
        key = names[threads].astype(np.int64) << 32
        key |= machine.block_threads if counts is None else counts[threads]
        parts = [(k, mine[key == k]) for k in np.unique(key).tolist()]
        if sum(len(machine.warps_of(part)) for _, part in parts) != len(machine.warps_of(mine)):
            raise BadBarrier("the threads of a warp name different barriers or counts")
        for k, part in parts:
            yield k >> 32, _counted(machine, k & 0xFFFFFFFF), part, machine.warps_of(part)

    return parties


@opcode("bar", "barrier")
def build_barrier(machine, instruction):
    """``bar.sync a[, b]``, ``bar.arrive a, b``, ``bar.red.op``, with ``.cta``; ``barrier`` is the
    same, ``.aligned`` or not"""
    root, modifiers = instruction.root, instruction.modifiers
    rest = [m for m in modifiers[modifiers[:1] == ("cta",) :] if m != "aligned" or root == "bar"]
    if rest[:1] == ["red"]:
        return _reduction(machine, instruction, rest[1:])
    if rest not in (["sync"], ["arrive"]):
        return None
    waits, operands = rest == ["sync"], instruction.operands
    if len(operands) not in ((1, 2) if waits else (2,)):
        return None
    parties = _parties(machine, operands[0], operands[1] if len(operands) > 1 else None)

    def run(threads) -> None:
        for name, count, part, warps in parties(threads):
            if not waits:
                machine.go_on(part)
            barrier(machine, name).arrive(warps, count, waits, part)

    return Step(run, CONTROL | TOGETHER)


_REDUCTIONS = {("popc", "u32"): np.count_nonzero, ("and", "pred"): np.all, ("or", "pred"): np.any}


def _reduction(machine, instruction, rest):
    """``bar.red.popc.u32 d, a[, b], p``; ``bar.red.and|or.pred``"""
    function = _REDUCTIONS.get(tuple(rest))
    d, name, *count, p = instruction.operands
    if function is None or len(count) > 1:
        return None
    result, p = machine.registers.result(d, rest[-1]), machine.registers.source(p, "pred")
    parties = _parties(machine, name, count[0] if count else None)

    def run(threads) -> None:
        for name, count, part, warps in parties(threads):
            held = barrier(machine, name)
            mine = machine.numbers[part]
            for block in np.unique(machine.block_of[mine]).tolist():
                here = mine[machine.block_of[mine] == block]
                held.reductions.append((block, here, p[here], function, result))
                warps = machine.warps_of(here)
                held.arrive(warps, count, True, here)
                held._reduce(block) if not held.wanted[block] else None

    return Step(run, CONTROL | TOGETHER)


@opcode("griddepcontrol")
def build_dependent(machine, instruction):
    """``griddepcontrol.wait`` and ``.launch_dependents``: one launch after another here"""
    known = (("wait",), ("launch_dependents",))
    return Step(lambda threads: None) if instruction.modifiers in known else None
