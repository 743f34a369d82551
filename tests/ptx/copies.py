"""Copies from global to shared memory that a thread does not wait for: PTX ISA 9.7.9.25.3.

Groups are counted per thread, as in PTX: the copies that a thread starts are of the group that it
commits next. Bytes move when the copy is issued (mode early) or when a thread waits for its group
(mode late), source and destination both, so that what is overwritten or read too early shows.

For races a warp is one: it knows a copy when one of its threads has waited for the copy's group.
``cp.async.mbarrier.arrive`` is not known: no kernel here has it.
"""

from dataclasses import dataclass

import numpy as np

from .asynchronous import Work
from .decode import Step, opcode
from .errors import BadAccess, MachineError
from .moves import address_of
from .program import Immediate, Instruction, Register

_KEY = ("cp.async",)
_LIMITS = {"ca": (4, 8, 16), "cg": (16,)}


@dataclass
class Piece:
    """The copies of one instruction, an element a thread: ``sizes`` None is all ``size`` bytes."""

    instruction: Instruction
    threads: np.ndarray
    groups: np.ndarray
    index: np.ndarray
    sources: np.ndarray
    size: int
    sizes: np.ndarray | None

    def part(self, chosen: np.ndarray) -> "Piece":
        """The copies of some threads."""
        if chosen.all():
            return self
        sizes = None if self.sizes is None else self.sizes[chosen]
        arrays = (self.threads, self.groups, self.index, self.sources)
        return Piece(self.instruction, *(a[chosen] for a in arrays), self.size, sizes)


class Copies(Work):
    """All copies of a group of blocks. ``committed`` and ``finished`` are groups of each thread."""

    def __init__(self, machine):
        super().__init__(self._finish_all)
        self.machine = machine
        self.committed = np.zeros(machine.threads, np.int32)
        self.finished = np.zeros(machine.threads, np.int32)
        self.pending: list[Piece] = []

    def add(self, piece: Piece) -> None:
        """Start copies: now, or when they are waited for."""
        if self.machine.mode.late:
            self.pending.append(piece)
        else:
            _move(self.machine, piece)

    def wait(self, threads, left: int) -> None:
        """Threads wait for all their groups but the newest ``left``."""
        upto = np.maximum(self.finished[threads], self.committed[threads] - left)
        self.finished[threads] = upto
        warps = self.machine.warp_of[threads]
        self.machine.watch.learn_copies(warps, upto)
        if self.pending:
            pending, self.pending = self.pending, []
            for piece in pending:
                self._advance(piece)

    def _advance(self, piece: Piece) -> None:
        """Do the copies of a piece whose groups are waited for, and keep the others."""
        due = piece.groups <= self.finished[piece.threads]
        if due.any():
            _move(self.machine, piece.part(due))
        if not due.all():
            self.pending.append(piece.part(~due))

    def _finish_all(self) -> None:
        for piece in self.pending:
            _move(self.machine, piece)
        self.pending.clear()


def copies(machine) -> Copies:
    """The copies of the blocks that run now."""
    works = machine.asynchronous.open.get(_KEY)
    if works is None:  # nobody commits this key: the blocks' end finishes what is left
        works = machine.asynchronous.open[_KEY] = [Copies(machine)]
    return works[0]


def _move(machine, piece: Piece) -> None:
    """Read the sources and write the destinations. An error is the copy's, whoever waits."""
    width, count = min(piece.size, 8), max(1, piece.size // 8)
    try:
        if piece.sizes is None:
            values = machine.memory.load(piece.sources, width, count)
        else:
            values = _partial(machine, piece).view(f"u{width}")
    except MachineError as error:
        raise type(error)(str(error), piece.instruction) from None
    machine.shared.put(piece.index, width, values)


def _partial(machine, piece: Piece) -> np.ndarray:
    """(threads, size) bytes: as many as the thread's size, then zeros."""
    values = np.zeros((len(piece.sources), piece.size), np.uint8)
    for size in np.unique(piece.sizes[piece.sizes > 0]).tolist():
        here = np.flatnonzero(piece.sizes == size)
        sources = piece.sources[here]
        if (sources % piece.size).any():
            raise BadAccess(f"a source of cp.async is no multiple of {piece.size}")
        values[here, :size] = _bytes(machine.memory, sources, size, min(8, size & -size))
    return values


def _bytes(memory, sources: np.ndarray, size: int, width: int) -> np.ndarray:
    """(threads, size) bytes. A size that is no power of two is read in smaller elements."""
    parts = [memory.load(sources + at, width, 1) for at in range(0, size, width)]
    return np.concatenate(parts, axis=1).view(np.uint8)


def _sizes(machine, operands, size: int):
    """A function from threads to the bytes that each reads, or to None where all read all."""
    if not operands:
        return lambda threads: None
    (given,) = operands
    if isinstance(given, Immediate) and given.value == size:
        return lambda threads: None
    if isinstance(given, Register) and machine.entry.registers[given.name] == "pred":
        ignored = machine.registers.source(given, "pred")
        return lambda threads: np.where(ignored[threads], 0, size)
    wanted = machine.registers.source(given, "u32")

    def sizes(threads):
        found = wanted[threads]
        if (found == size).all():
            return None
        if (found > size).any():
            raise BadAccess(f"cp.async of {size} bytes has a source of {int(found.max())}")
        return found.copy()  # the register may change before the copy is done

    return sizes


@opcode("cp")
def build_copy(machine, instruction):
    """``cp.async.ca|cg.shared[::cta].global [dst], [src], 4|8|16[, src-size | ignore]``, and
    ``cp.async.commit_group``, ``wait_group N``, ``wait_all``. Cache hints say nothing here."""
    modifiers = instruction.modifiers
    if modifiers[:1] != ("async",) or len(modifiers) < 2:
        return None
    if len(modifiers) == 2:
        return _group_step(machine, instruction)
    hints = ("L2::cache_hint", "L2::64B", "L2::128B", "L2::256B")
    if modifiers[1] not in _LIMITS or any(m not in hints for m in modifiers[4:]):
        return None
    if modifiers[2] not in ("shared", "shared::cta") or modifiers[3] != "global":
        return None
    _, _, size, *rest = instruction.operands
    if "L2::cache_hint" in modifiers:
        rest = rest[:-1]
    if size.value not in _LIMITS[modifiers[1]] or len(rest) > 1:
        return None
    return _copy_step(machine, instruction, size.value, rest)


def _copy_step(machine, instruction, size: int, rest) -> Step:
    to, source = (address_of(machine, operand) for operand in instruction.operands[:2])
    sizes_of = _sizes(machine, rest, size)
    shared, watch = machine.shared, machine.watch

    def run(threads):
        where, sources, warps = to(threads), source(threads), machine.warp_of[threads]
        sizes = sizes_of(threads)
        if machine.counts.on:
            read = slice(None) if sizes is None else sizes > 0
            machine.counts.global_access(sources[read], size, warps[read], True)
        machine.counts.shared_access(where, size, warps)
        index = shared.index(where, machine.block_of[threads], size)
        mine = copies(machine)
        groups = mine.committed[threads] + 1
        watch.copy(index, size, warps, groups)
        mine.add(Piece(instruction, machine.numbers[threads], groups, index, sources, size, sizes))

    return Step(run)


def _group_step(machine, instruction) -> Step | None:
    form, operands = instruction.modifiers[1], instruction.operands
    if form == "commit_group" and not operands:

        def run(threads):
            copies(machine).committed[threads] += 1
    elif form == "wait_group" and len(operands) == 1 and operands[0].value >= 0:
        left = operands[0].value

        def run(threads):
            copies(machine).wait(threads, left)
    elif form == "wait_all" and not operands:

        def run(threads):
            mine = copies(machine)
            mine.committed[threads] += 1
            mine.wait(threads, 0)
    else:
        return None
    return Step(run)
