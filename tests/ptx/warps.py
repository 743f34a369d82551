"""The threads of a warp with each other: PTX ISA 9.7.9.6 (shfl.sync) and 9.7.13 (vote.sync,
match.sync, activemask, redux.sync, elect.sync, bar.warp.sync).

All of them want the whole warp: a member mask other than -1 is Unsupported. Lanes that have ended
take no part: they vote for nothing, and to read from one is an error.
"""

import functools

import numpy as np

from .decode import TOGETHER, Step, opcode
from .errors import MachineError, Unsupported
from .program import Immediate, Pair, Register, Sink
from .registers import WARP

_ALL = 0xFFFFFFFF
_BITS = np.uint32(1) << np.arange(WARP, dtype=np.uint32)


def whole_mask(machine, operand):
    """A check of the member mask, for each execution; None where it is known to be right."""
    if isinstance(operand, Immediate):
        if operand.value & _ALL != _ALL:
            raise Unsupported(f"member mask {operand.value:#x}: only whole warps, -1, are known")
        return None
    mask = machine.registers.source(operand, "u32")

    def check(threads) -> None:
        given = mask[threads]
        if (given != _ALL).any():
            wrong = int(given[given != _ALL][0])
            raise Unsupported(f"member mask {wrong:#x}: only whole warps, -1, are known")

    return check


def checked(check, run):
    """``run`` with the check of the member mask before it, where one is needed."""
    if check is None:
        return run

    def both(threads) -> None:
        check(threads)
        run(threads)

    return both


def lanes(machine, values: np.ndarray, threads, absent) -> np.ndarray:
    """(all warps, 32) values; ``absent`` for the lanes that do not take part."""
    if len(values) == machine.threads:
        return values.reshape(-1, WARP)
    out = np.full(machine.threads, absent, values.dtype)
    out[threads] = values
    return out.reshape(-1, WARP)


def spread(machine, per_warp: np.ndarray, threads) -> np.ndarray:
    """The value of its warp for each of ``threads``."""
    return per_warp[machine.warp_of[threads]]


def _results(machine, operand, type_: str):
    """The arrays of ``d``, ``d|p``, ``_|p``: (d or None, p or None)."""
    first, second = (
        (operand.first, operand.second) if isinstance(operand, Pair) else (operand, Sink())
    )
    found = []
    for item, wanted in ((first, type_), (second, "pred")):
        found.append(None if isinstance(item, Sink) else machine.registers.result(item, wanted))
    return found


def source_lanes(mode: str, lane: np.ndarray, b: np.ndarray, c: np.ndarray):
    """(the lane read from, whether it is in range): PTX ISA 9.7.9.6.

    ``c`` holds the clamp in bits 0-4 and in bits 8-12 the mask that divides a warp into segments.
    """
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    low = lane & segment
    high = low | (clamp & ~segment)
    if mode == "up":
        wanted = lane - b
        inside = wanted >= high
    else:
        wanted = {"down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}[mode]
        inside = wanted <= high
    return np.where(inside, wanted, lane), inside


@functools.cache
def _one_warp(mode: str, b: int, c: int):
    """``source_lanes`` of the lanes of a warp."""
    return source_lanes(mode, np.arange(WARP), np.int64(b), np.int64(c))


@opcode("shfl")
def build_shuffle(machine, instruction):
    """``shfl.sync.mode.b32 d[|p], a, b, c, membermask``"""
    modifiers = instruction.modifiers
    if len(modifiers) != 3 or modifiers[0] != "sync" or modifiers[2] != "b32":
        return None
    mode = modifiers[1]
    if mode not in ("up", "down", "bfly", "idx"):
        return None
    d, a, b, c, mask = instruction.operands
    result, valid = _results(machine, d, "b32")
    a = machine.registers.source(a, "b32")
    sources = [machine.registers.source(o, "u32") for o in (b, c)]
    numbers = machine.numbers
    lane, base = numbers % WARP, numbers - numbers % WARP
    constant = all(isinstance(o, Immediate) for o in (b, c))
    if constant:
        one_warp = _one_warp(mode, *(int(s[0]) for s in sources))
        table, ranges = (np.tile(each, machine.warps) for each in one_warp)
        table += base

    def run(threads) -> None:
        if constant:
            source, inside = table[threads], ranges[threads]
        else:
            b, c = (s[threads].astype(np.int64) for s in sources)
            source, inside = source_lanes(mode, lane[threads], b, c)
            source = source + base[threads]
        if machine.ended and not machine.alive[source].all():
            _from_ended(machine, source)
        if result is not None:
            result[threads] = a[source]
        if valid is not None:
            valid[threads] = inside

    return Step(checked(whole_mask(machine, mask), run), TOGETHER)


def _from_ended(machine, source: np.ndarray) -> None:
    wrong = int(source[~machine.alive[source]][0])
    raise MachineError(f"reads from lane {wrong % WARP} of warp {wrong // WARP}, which has ended")


@opcode("vote")
def build_vote(machine, instruction):
    """``vote.sync.all|any|uni.pred d, a, membermask``; ``vote.sync.ballot.b32 d, a, membermask``"""
    forms = {("sync", m, "pred") for m in ("all", "any", "uni")} | {("sync", "ballot", "b32")}
    if instruction.modifiers not in forms:
        return None
    mode = instruction.modifiers[1]
    d, a, mask = instruction.operands
    result = machine.registers.result(d, instruction.type)
    a = machine.registers.source(a, "pred")

    def run(threads) -> None:
        values = a[threads]
        some = lanes(machine, values, threads, False)
        if mode == "ballot":
            found = some @ _BITS
        elif mode == "any":
            found = some.any(axis=1)
        else:
            every = lanes(machine, values, threads, True).all(axis=1)
            found = every if mode == "all" else every | ~some.any(axis=1)
        result[threads] = spread(machine, found, threads)

    return Step(checked(whole_mask(machine, mask), run), TOGETHER)


@opcode("activemask")
def build_active(machine, instruction):
    """``activemask.b32 d``: the lanes that execute this together"""
    if instruction.modifiers != ("b32",):
        return None
    result = machine.registers.result(instruction.operands[0], "b32")
    ones = np.ones(machine.threads, bool)

    def run(threads) -> None:
        found = lanes(machine, ones[threads], threads, False) @ _BITS
        result[threads] = spread(machine, found, threads)

    return Step(run)


_REDUCED = {
    "add": (np.add, 0), "and": (np.bitwise_and, _ALL), "or": (np.bitwise_or, 0),
    "xor": (np.bitwise_xor, 0),
}  # fmt: skip


@opcode("redux")
def build_reduce(machine, instruction):
    """``redux.sync.add|min|max.u32|s32 d, a, membermask``; ``redux.sync.and|or|xor.b32``"""
    modifiers = instruction.modifiers
    arithmetic = {("sync", o, t) for o in ("add", "min", "max") for t in ("u32", "s32")}
    if modifiers not in arithmetic | {("sync", o, "b32") for o in ("and", "or", "xor")}:
        return None
    operation, type_ = modifiers[1:]
    d, a, mask = instruction.operands
    result, a = machine.registers.result(d, type_), machine.registers.source(a, type_)
    if operation in _REDUCED:
        function, absent = _REDUCED[operation]
    else:
        limits = np.iinfo(a.dtype)
        function, absent = (
            (np.minimum, limits.max) if operation == "min" else (np.maximum, limits.min)
        )

    def run(threads) -> None:
        found = function.reduce(lanes(machine, a[threads], threads, absent), axis=1, dtype=a.dtype)
        result[threads] = spread(machine, found, threads)

    return Step(checked(whole_mask(machine, mask), run), TOGETHER)


@opcode("elect")
def build_elect(machine, instruction):
    """``elect.sync d|p, membermask``: p is true in one lane, whose number is d: here the lowest"""
    if instruction.modifiers != ("sync",):
        return None
    d, mask = instruction.operands
    if not isinstance(d, Pair):
        return None
    leader, chosen = _results(machine, d, "b32")
    numbers = machine.numbers
    ones = np.ones(machine.threads, bool)
    lane = (numbers % WARP).astype(np.uint32)

    def run(threads) -> None:
        first = lanes(machine, ones[threads], threads, False).argmax(axis=1).astype(np.uint32)
        found = spread(machine, first, threads)
        if leader is not None:
            leader[threads] = found
        if chosen is not None:
            chosen[threads] = lane[threads] == found

    return Step(checked(whole_mask(machine, mask), run), TOGETHER)


@opcode("match")
def build_match(machine, instruction):
    """``match.any.sync.type d, a, membermask``: the lanes with my value;
    ``match.all.sync.type d[|p], a, membermask``: all lanes or none"""
    modifiers = instruction.modifiers
    if len(modifiers) != 3 or modifiers[1] != "sync" or modifiers[2] not in ("b32", "b64"):
        return None
    mode, type_ = modifiers[0], modifiers[2]
    d, a, mask = instruction.operands
    if mode not in ("any", "all") or (mode == "any" and not isinstance(d, Register)):
        return None
    result, same = _results(machine, d, "b32")
    a = machine.registers.source(a, type_)
    ones = np.ones(machine.threads, bool)

    def run(threads) -> None:
        values = lanes(machine, a[threads], threads, 0)
        here = lanes(machine, ones[threads], threads, False)
        equal = (values[:, :, None] == values[:, None, :]) & here[:, None, :]
        found = (equal @ _BITS).ravel()[numbers[threads]]
        if mode == "all":
            wanted = spread(machine, here @ _BITS, threads)
            all_same = found == wanted
            found = np.where(all_same, wanted, np.uint32(0))
            if same is not None:
                same[threads] = all_same
        if result is not None:
            result[threads] = found

    numbers = machine.numbers
    return Step(checked(whole_mask(machine, mask), run), TOGETHER)


@opcode("bar")
def build_warp_barrier(machine, instruction):
    """``bar.warp.sync membermask``: a warp's accesses are in order here, so it moves nothing"""
    if instruction.modifiers != ("warp", "sync"):
        return None
    (mask,) = instruction.operands
    return Step(checked(whole_mask(machine, mask), lambda threads: None), TOGETHER)
