"""setp and set: PTX ISA 9.7.6."""

import numpy as np

from .decode import Step, opcode
from .floats import flush
from .halves import HALVES, decoded
from .program import Pair, Sink
from .rounding import rounded_bits

_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _plain(name: str, is_float: bool):
    """The function of a comparison; ``ltu`` and its like are true of a NaN too."""
    if name in _ORDERED:
        if is_float and name == "ne":  # numpy's is true of a NaN, PTX's is not
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
        return _ORDERED[name]
    if not is_float:
        return None
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name[:-1] in _ORDERED and name.endswith("u"):
        return lambda a, b: _ORDERED[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return None


_UNSIGNED = ("lo", "ls", "hi", "hs")  # not of floats
_JOINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_NUMBERS = ("u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64", "f32", "f64")


def _words(between) -> tuple[str | None, bool] | None:
    """(how it is joined, whether it flushes) of the modifiers between comparison and type."""
    join = [word for word in between if word != "ftz"]
    if len(join) > 1 or len(between) - len(join) > 1 or not set(join) <= set(_JOINED):
        return None
    return (join[0] if join else None), "ftz" in between


def _half_comparison(name: str, type_: str, flushes: bool):
    """A comparison of bits of 16-bit floats, or None."""
    plain = _plain(name, True)
    if plain is None or name in _UNSIGNED or (flushes and type_ == "bf16"):
        return None
    read = decoded(type_, flushes)
    return lambda a, b: plain(read(a), read(b))


@opcode("setp")
def build_compare(machine, instruction):
    """``setp.comparison[.and|or|xor][.ftz].type p[|q], a, b[, c]``; of pairs of 16-bit floats p is
    of the low halves, q of the high ones"""
    name, *between, kind = instruction.modifiers
    words = _words(between)
    if words is None:
        return None
    join, flushes = words
    if kind in HALVES:
        function, type_ = _half_comparison(name, HALVES[kind], flushes), "b16"
    else:
        function, type_ = _comparison(name, kind, flushes), kind
    if function is None:
        return None
    if kind.endswith("x2"):
        if not isinstance(instruction.operands[0], Pair):
            return None
        return _compare(machine, instruction, _of_pairs(function), "b32", join)
    return _compare(machine, instruction, _with_opposite(function), type_, join)


def _with_opposite(function):
    """A function that gives the results of a comparison for p and for q."""

    def run(a, b):
        found = function(a, b)
        return found, ~found

    return run


def _of_pairs(function):
    """The same of packed registers: of their low halves, and of their high ones."""

    def run(a, b):
        x, y = (np.ascontiguousarray(each).view(np.uint16) for each in (a, b))
        return function(x, y).reshape(-1, 2).T

    return run


def _comparison(name: str, kind: str, flushes: bool):
    """A comparison of integers, bits, fp32 or fp64, or None."""
    plain = _plain(name, kind[0] == "f")
    if plain is None or kind not in _NUMBERS or (flushes and kind != "f32"):
        return None
    if (kind[0] == "b" and name not in ("eq", "ne")) or (kind[0] == "f" and name in _UNSIGNED):
        return None
    return (lambda a, b: plain(flush(a), flush(b))) if flushes else plain


def _compare(machine, instruction, function, type_, join):
    """The step of a comparison that writes one predicate or two."""
    registers = machine.registers
    d, a, b, *more = instruction.operands
    if (join is None) != (not more):
        return None
    outputs = (d.first, d.second) if isinstance(d, Pair) else (d, Sink())
    results = [None if isinstance(o, Sink) else registers.result(o, "pred") for o in outputs]
    a, b = registers.source(a, type_), registers.source(b, type_)
    c = registers.source(more[0], "pred") if more else None

    def run(threads):
        joined = None if c is None else c[threads].copy()  # c may be one of the results
        for result, value in zip(results, function(a[threads], b[threads])):
            if result is not None:
                result[threads] = value if joined is None else _JOINED[join](value, joined)

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
    function = _comparison(name, kind, flushes)
    if function is None or to not in ("u32", "s32", "f32"):
        return None
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
