"""setp of 16-bit floats, and set: PTX ISA 9.7.6."""

import numpy as np

from .arithmetic import JOINED, compare, comparison
from .decode import Step, opcode
from .floats import flush
from .halves import HALVES, decoded
from .program import Pair, Sink
from .rounding import rounded_bits

_NUMBERS = ("u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64", "f32", "f64")


def _words(between) -> tuple[str | None, bool] | None:
    """(how it is joined, whether it flushes) of the modifiers between comparison and type."""
    join = [word for word in between if word != "ftz"]
    if len(join) > 1 or len(between) - len(join) > 1 or not set(join) <= set(JOINED):
        return None
    return (join[0] if join else None), "ftz" in between


def _half_comparison(name: str, type_: str, flushes: bool):
    """A comparison of bits of 16-bit floats, or None."""
    plain = comparison(name, True)
    if plain is None or name in ("lo", "ls", "hi", "hs") or (flushes and type_ == "bf16"):
        return None
    read = decoded(type_, flushes)
    return lambda a, b: plain(read(a), read(b))


@opcode("setp")
def build_half_compare(machine, instruction):
    """``setp.comparison[.and|or|xor][.ftz].f16 p[|q], a, b[, c]``; of pairs p is of the low halves,
    q of the high ones"""
    if len(instruction.modifiers) < 2 or instruction.type not in HALVES:
        return None
    name, *between, kind = instruction.modifiers
    words = _words(between)
    if words is None:
        return None
    join, flushes = words
    function = _half_comparison(name, HALVES[kind], flushes)
    if function is None:
        return None
    if kind.endswith("x2"):
        return _compare_pairs(machine, instruction, function, join)
    return compare(machine, instruction, function, "b16", join)


def _compare_pairs(machine, instruction, function, join):
    registers = machine.registers
    d, a, b, *more = instruction.operands
    if not isinstance(d, Pair) or (join is None) != (not more):
        return None
    results = [
        None if isinstance(o, Sink) else registers.result(o, "pred") for o in (d.first, d.second)
    ]
    a, b = registers.source(a, "b32"), registers.source(b, "b32")
    c = registers.source(more[0], "pred") if more else None

    def run(threads):
        x, y = (np.ascontiguousarray(r[threads]).view(np.uint16) for r in (a, b))
        found = function(x, y).reshape(-1, 2)
        joined = c[threads].copy() if c is not None else None  # a result may be c's register
        for n, result in enumerate(results):
            if result is not None:
                value = found[:, n]
                result[threads] = value if joined is None else JOINED[join](value, joined)

    return Step(run)


def _true_bits(to: str):
    """The results of ``set`` for true: 1.0 of floats, all ones of integers."""
    if to == "f32":
        return np.uint32(0x3F800000)
    if to in ("f16", "bf16"):
        return np.uint16(rounded_bits(np.ones(1, np.float32), to)[0])
    return {"u16": np.uint16, "s16": np.uint16}.get(to, np.uint32)(2 ** (16 if to[1:] == "16" else 32) - 1)  # fmt: skip


@opcode("set")
def build_set(machine, instruction):
    """``set.comparison[.ftz].to.from d, a, b``: 1.0 or all ones where it is true, else 0"""
    if len(instruction.modifiers) < 3 or len(instruction.operands) != 3:
        return None
    name, *between, to, kind = instruction.modifiers
    if between not in ([], ["ftz"]):
        return None
    flushes = bool(between)
    if kind in HALVES:
        return _set_halves(machine, instruction, name, to, kind, flushes)
    if kind not in _NUMBERS or to not in ("u32", "s32", "f32") or (flushes and kind != "f32"):
        return None
    plain = comparison(name, kind[0] == "f")
    if plain is None or (kind[0] == "b" and name not in ("eq", "ne")):
        return None
    function = (lambda a, b: plain(flush(a), flush(b))) if flushes else plain
    return _setting(machine, instruction, function, kind, to)


def _set_halves(machine, instruction, name, to, kind, flushes):
    function = _half_comparison(name, HALVES[kind], flushes)
    if function is None:
        return None
    if not kind.endswith("x2"):
        known = to in ("u16", "s16", "u32", "s32", kind)
        return _setting(machine, instruction, function, "b16", to) if known else None
    if to not in ("u32", "s32", kind):
        return None
    yes = _true_bits(HALVES[kind] if to == kind else "u16")
    registers = machine.registers
    d, a, b = instruction.operands
    result, a, b = (
        registers.result(d, "b32"),
        registers.source(a, "b32"),
        registers.source(b, "b32"),
    )

    def run(threads):
        x, y = (np.ascontiguousarray(r[threads]).view(np.uint16) for r in (a, b))
        result[threads] = (function(x, y) * yes).view(np.uint32)

    return Step(run)


def _setting(machine, instruction, function, kind, to):
    """The step that writes the bits of true where the comparison holds."""
    registers, yes = machine.registers, _true_bits(to)
    d, a, b = instruction.operands
    result = registers.result(d, f"b{8 * yes.itemsize}")
    a, b = registers.source(a, kind), registers.source(b, kind)

    def run(threads):
        result[threads] = function(a[threads], b[threads]) * yes

    return Step(run)
