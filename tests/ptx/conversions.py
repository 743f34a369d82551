"""cvt: PTX ISA 9.7.9.21.

Results go to registers as bits: a register may be wider than the type, and then gets the value
extended. 16-bit floats are their bits (``rounding``).
"""

import numpy as np

from .decode import Step, opcode
from .floats import flush, saturated
from .halves import clamped
from .program import SIZES
from .registers import DTYPES
from .rounding import (
    CANONICAL,
    LARGEST,
    MODES,
    exact_integer,
    rounded_bits,
    values,
)

_INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
_FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_DIGITS = {"f16": 11, "bf16": 8, "f32": 24, "f64": 53}


@opcode("cvt")
def build_conversion(machine, instruction):
    """``cvt[.rounding][.ftz][.sat][.relu][.satfinite].to.from d, a[, b]``"""
    *how, to, origin = instruction.modifiers
    if len(set(how)) != len(how):
        return None
    how = set(how)
    if to in ("f16x2", "bf16x2"):
        return _packed(machine, instruction, how, to[:-2], origin)
    if len(instruction.operands) != 2:
        return None
    if to == "tf32":
        return _tensor_float(machine, instruction, how, origin)
    if to in _INTEGERS:
        if origin in _INTEGERS:
            return _between_integers(machine, instruction, how, to, origin)
        return _float_to_integer(machine, instruction, how, to, origin)
    if to not in _FLOATS:
        return None
    if origin in _INTEGERS:
        return _integer_to_float(machine, instruction, how, to, origin)
    return _between_floats(machine, instruction, how, to, origin)


def _step(machine, instruction, function, to: str, origin: str) -> Step:
    """The step that writes ``function`` of an operand."""
    d, a = instruction.operands
    registers = machine.registers
    result = registers.result(d, to) if to in ("f32", "f64") else registers.wide_result(d, to)
    source = registers.source(a, origin)

    def run(threads):
        result[threads] = function(source[threads])

    return Step(run)


def _raw(type_: str) -> str:
    """The type whose dtype a float is read or written as: 16-bit floats are bits."""
    return "b16" if type_ in ("f16", "bf16") else type_


def _limited(low: int, high: int, dtype):
    """Integers clamped to [low, high]."""

    def run(x):
        limits = np.iinfo(x.dtype)
        return np.clip(x, max(low, limits.min), min(high, limits.max)).astype(dtype)

    return run


def _between_integers(machine, instruction, how, to, origin):
    """``cvt[.sat].u8.s32``: the low bits, or with ``.sat`` the value clamped"""
    if not how <= {"sat"}:
        return None
    dtype = DTYPES[to]
    if how:
        limits = np.iinfo(dtype)
        return _step(machine, instruction, _limited(limits.min, limits.max, dtype), to, origin)
    return _step(machine, instruction, lambda x: x.astype(dtype), to, origin)


def _reader(origin: str, flushes: bool):
    """A function from a register's array to its floats."""
    if origin in ("f16", "bf16"):
        return lambda bits: values(bits, origin)
    return flush if flushes else (lambda x: x)


def _float_to_integer(machine, instruction, how, to, origin):
    """``cvt.rzi[.ftz][.sat].s32.f32``: clamped; a NaN becomes 0, or the highest bit where fp64 or 64
    bits take part"""
    rounding = how & set(_TO_INTEGER)
    if len(rounding) != 1 or not how - rounding <= {"ftz", "sat"} or origin not in _FLOATS:
        return None
    if "ftz" in how and origin != "f32":
        return None
    read, whole = _reader(origin, "ftz" in how), _TO_INTEGER[rounding.pop()]
    dtype = DTYPES[to]
    limits = np.iinfo(dtype)
    low, beyond = float(limits.min), float(limits.max + 1)
    nothing = 0
    if origin == "f64" or to in ("s64", "u64"):
        nothing = np.array(1 << limits.bits - 1, f"u{limits.bits // 8}").view(dtype)

    def converted(x):
        found = whole(read(x).astype(np.float64))
        inside = (found >= low) & (found < beyond)
        kept = np.where(inside, found, 0).astype(dtype)
        if inside.all():
            return kept
        kept = np.where(found >= beyond, limits.max, kept)
        kept = np.where(found < low, limits.min, kept)
        return np.where(np.isnan(found), nothing, kept).astype(dtype)

    return _step(machine, instruction, converted, to, _raw(origin))


def _integer_to_float(machine, instruction, how, to, origin):
    """``cvt.rn[.ftz][.sat].f32.s32``: rounded as is said"""
    rounding = how & set(MODES)
    if len(rounding) != 1 or not how - rounding <= {"sat", "ftz"}:
        return None
    if ("ftz" in how and to != "f32") or (to == "bf16" and "sat" in how):
        return None
    mode, sat = rounding.pop(), "sat" in how
    if to == "f64":
        if mode != "rn" and SIZES[origin] == 8:
            return None
        plain = lambda x: x.astype(np.float64)  # noqa: E731
        function = (lambda x: saturated(plain(x))) if sat else plain
    elif to == "f32" and mode == "rn" and not sat:
        function = lambda x: x.astype(np.float32)  # noqa: E731
    else:

        def function(x):
            exact = exact_integer(x)
            bits = rounded_bits(saturated(exact) if sat else exact, to, mode)
            return bits.view(np.float32) if to == "f32" else bits

    return _step(machine, instruction, function, _raw(to), origin)


def _between_floats(machine, instruction, how, to, origin):
    """``cvt[.rn][.ftz][.sat][.relu][.satfinite].to.from``, and ``cvt.rni.f32.f32`` to whole numbers"""
    if origin not in _FLOATS:
        return None
    narrows = _DIGITS[to] < _DIGITS[origin] or {to, origin} == {"f16", "bf16"}
    roundings = how & {*MODES, *_TO_INTEGER}
    extra = how - roundings
    if len(roundings) > 1 or not extra <= {"ftz", "sat", "relu", "satfinite"}:
        return None
    mode = next(iter(roundings), None)
    if mode in _TO_INTEGER and to != origin:
        return None
    if mode in MODES and (to == origin or not narrows):
        return None
    if mode is None and narrows:
        return None
    if not _extra_is_known(extra, to, origin):
        return None
    function = _float_function(mode, extra, to, origin)
    return _step(machine, instruction, function, _raw(to), _raw(origin))


def _extra_is_known(extra: set[str], to: str, origin: str) -> bool:
    """Whether a conversion between floats may have these modifiers."""
    if "ftz" in extra and "f32" not in (to, origin):
        return False
    if "sat" in extra and ("bf16" in (to, origin) or extra & {"relu", "satfinite"}):
        return False
    return not extra & {"relu", "satfinite"} or (origin == "f32" and to in ("f16", "bf16"))


def _float_function(mode, extra, to, origin):
    """A function from a register's array to the result's."""
    read = _reader(origin, "ftz" in extra and origin == "f32")
    change = _changes(extra, to)
    whole = _TO_INTEGER.get(mode)
    rounding = mode if mode in MODES else "rn"

    def run(x):
        found = read(x)
        if whole is not None:
            found = whole(found)
        return _written(change(found), to, rounding)

    if to == "f32" and "ftz" in extra:
        return lambda x: flush(run(x))
    return run


def _written(x: np.ndarray, to: str, mode: str) -> np.ndarray:
    """Floats as a register's array of a type."""
    if to == "f64":
        return x.astype(np.float64)
    if to == "f32":
        return x if x.dtype == np.float32 else rounded_bits(x, "f32", mode).view(np.float32)
    return rounded_bits(x, to, mode)


def _changes(extra: set[str], to: str):
    """What ``.sat``, ``.relu`` and ``.satfinite`` do before the rounding."""
    if "sat" in extra:
        return saturated
    if not extra & {"relu", "satfinite"}:
        return lambda x: x
    largest = np.float32(LARGEST.get(to, np.inf)) if "satfinite" in extra else np.float32(np.inf)

    def run(x):
        if "relu" in extra:
            x = clamped(x)
        return np.clip(x, -largest, largest)

    return run


def _packed(machine, instruction, how, to, origin):
    """``cvt.rn[.relu][.satfinite].f16x2.f32 d, a, b``: a becomes the high half, b the low one"""
    mode = how & {"rn", "rz"}
    extra = how - mode
    if origin != "f32" or len(mode) != 1 or not extra <= {"relu", "satfinite"}:
        return None
    registers = machine.registers
    d, a, b = instruction.operands
    result = registers.result(d, "b32")
    high, low = registers.source(a, "f32"), registers.source(b, "f32")
    halves = result.view(np.uint16).reshape(-1, 2)
    change, mode, plain = _changes(extra, to), mode.pop(), not extra

    def run(threads):
        x, y = low[threads], high[threads]
        both = np.empty((len(x), 2), np.float32)
        both[:, 0], both[:, 1] = x, y
        halves[threads] = rounded_bits(both if plain else change(both), to, mode)

    return Step(run)


def _tensor_float(machine, instruction, how, origin):
    """``cvt.rna|rn|rz[.relu][.satfinite].tf32.f32 d, a``: 10 bits after the point"""
    mode = how & {"rna", "rn", "rz"}
    extra = how - mode
    if origin != "f32" or len(mode) != 1 or not extra <= {"relu", "satfinite"}:
        return None
    mode = mode.pop()
    if mode == "rna" and "relu" in extra:
        return None
    largest = np.uint32(0x7F7FE000).view(np.float32) if "satfinite" in extra else np.inf

    def converted(x):
        if "relu" in extra:
            x = clamped(x)
        bits = tf32_bits(x, mode)
        if "satfinite" not in extra:
            return bits
        return np.clip(bits.view(np.float32), -largest, largest).view(np.uint32)

    d, a = instruction.operands
    result, source = machine.registers.result(d, "b32"), machine.registers.source(a, "f32")

    def run(threads):
        result[threads] = converted(source[threads])

    return Step(run)


def tf32_bits(x: np.ndarray, mode: str = "rna") -> np.ndarray:
    """fp32 rounded to 10 bits after the point; ``rna``: ties away from zero."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    if mode == "rna":
        found = bits + np.uint32(0x1000)
    elif mode == "rn":
        found = bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    else:
        found = bits
    found = found & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), np.uint32(CANONICAL["f32"]), found)
