"""Integers, bits, predicates and selection: PTX ISA 9.7.1, 9.7.5, 9.7.8."""

import numpy as np

from .decode import opcode
from .machine import Step
from .program import SIZES, Pair, Sink
from .registers import DTYPES

_INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
_BITS = ("pred", "b16", "b32", "b64")
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def elementwise(machine, instruction, function, type_, result_type=None):
    """The step of an instruction whose operands all have ``type_``."""
    registers = machine.registers
    result = registers.result(instruction.operands[0], result_type or type_)
    sources = [registers.source(o, type_) for o in instruction.operands[1:]]
    if len(sources) == 1:
        (one,) = sources

        def run(threads):
            result[threads] = function(one[threads])
    elif len(sources) == 2:
        one, two = sources

        def run(threads):
            result[threads] = function(one[threads], two[threads])
    else:

        def run(threads):
            result[threads] = function(*(source[threads] for source in sources))

    return Step(run)


def _divide(a, b):
    """Towards zero; a division by zero gives all ones, as on a GPU."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~np.zeros_like(a), a // np.where(b == 0, 1, b))
    safe = np.where(b == 0, 1, b)
    with np.errstate(over="ignore"):
        quotient = a // safe
        quotient += ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, -np.ones_like(a), quotient)


def _remainder(a, b):
    with np.errstate(over="ignore"):
        return np.where(b == 0, a, a - _divide(a, b) * b).astype(a.dtype)


_PLAIN = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative,
    "abs": np.abs, "div": _divide, "rem": _remainder,
}  # fmt: skip


def integer(machine, instruction):
    """add, sub, min, max, neg, abs, div, rem of integers; None for other types."""
    if len(instruction.modifiers) != 1 or instruction.type not in _INTEGERS:
        return None
    return elementwise(machine, instruction, _PLAIN[instruction.root], instruction.type)


def _product_part(type_: str, part: str):
    """The low or high half of a product."""
    if part == "lo":
        return np.multiply
    bits = 8 * SIZES[type_]
    if bits < 64:
        wide = DTYPES[_WIDER[type_]]
        return lambda a, b: (a.astype(wide) * b.astype(wide) >> bits).astype(a.dtype)
    return lambda a, b: _high_64(a, b)


def _high_64(a, b):
    """The high halves of products of 64 bits, in Python's own integers."""
    bits = [int(x) * int(y) >> 64 for x, y in zip(a.tolist(), b.tolist())]
    return np.array([n & (2**64 - 1) for n in bits], np.uint64).view(a.dtype)


def integer_product(machine, instruction):
    """mul and mad of integers: lo, hi, wide; None for other types."""
    modifiers = instruction.modifiers
    if (
        len(modifiers) != 2
        or modifiers[0] not in ("lo", "hi", "wide")
        or modifiers[1] not in _INTEGERS
    ):
        return None
    part, type_ = modifiers
    registers = machine.registers
    d, *rest = instruction.operands
    a, b = (registers.source(o, type_) for o in rest[:2])
    result_type = type_
    if part == "wide":
        result_type = _WIDER[type_]
        wide = DTYPES[result_type]

        def product(x, y):
            return x.astype(wide) * y.astype(wide)
    else:
        product = _product_part(type_, part)
    result = registers.result(d, result_type)
    if instruction.root == "mul":

        def run(threads):
            result[threads] = product(a[threads], b[threads])
    else:
        c = registers.source(rest[2], result_type)

        def run(threads):
            result[threads] = product(a[threads], b[threads]) + c[threads]

    return Step(run)


@opcode("rem")
def build_remainder(machine, instruction):
    """``rem.type d, a, b``"""
    return integer(machine, instruction)


@opcode("mad")
def build_multiply_add(machine, instruction):
    """``mad.mode.type d, a, b, c`` of integers"""
    return integer_product(machine, instruction)


_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@opcode("and", "or", "xor", "not")
def build_logic(machine, instruction):
    """``and.type d, a, b``, of bits and predicates"""
    if len(instruction.modifiers) != 1 or instruction.type not in _BITS:
        return None
    if instruction.root == "not":
        function = np.logical_not if instruction.type == "pred" else np.invert
    else:
        function = _LOGIC[instruction.root]
    return elementwise(machine, instruction, function, instruction.type)


@opcode("shl", "shr")
def build_shift(machine, instruction):
    """``shl.type d, a, n``: n is a u32, and is limited to the size of the type"""
    type_ = instruction.type
    if len(instruction.modifiers) != 1 or type_ not in (*_INTEGERS, *_BITS[1:]):
        return None
    registers, bits = machine.registers, 8 * SIZES[type_]
    d, a, n = instruction.operands
    result, a, n = (
        registers.result(d, type_),
        registers.source(a, type_),
        registers.source(n, "u32"),
    )
    shift = np.left_shift if instruction.root == "shl" else np.right_shift
    signed = type_[0] == "s"
    dtype = result.dtype

    def run(threads):
        count = n[threads]
        limited = np.minimum(count, bits - 1).astype(dtype)
        found = shift(a[threads], limited)
        if not signed:
            found = np.where(count >= bits, dtype.type(0), found)
        result[threads] = found

    return Step(run)


@opcode("bfe")
def build_extract(machine, instruction):
    """``bfe.type d, a, position, length``: a field of bits, extended by its sign for signed types"""
    type_ = instruction.type
    if instruction.modifiers != (type_,) or type_ not in ("u32", "s32", "u64", "s64"):
        return None
    registers, bits = machine.registers, 8 * SIZES[type_]
    d, a, position, length = instruction.operands
    result, a = registers.result(d, type_), registers.source(a, f"u{bits}")
    position, length = registers.source(position, "u32"), registers.source(length, "u32")
    one = np.uint64(1)

    def run(threads):
        value, at = a[threads].astype(np.uint64), (position[threads] & 0xFF).astype(np.uint64)
        count = (length[threads] & 0xFF).astype(np.uint64)
        if type_[0] == "s":
            value = a[threads].view(f"i{bits // 8}").astype(np.int64).view(np.uint64)
            top = np.minimum(at + count - np.uint64(1), np.uint64(bits - 1))
            sign = np.where(count == 0, np.uint64(0), value >> top & one)
        else:
            sign = np.zeros_like(value)
        wide = np.minimum(at, np.uint64(63))
        field = np.where(at >= bits, np.uint64(0), value >> wide)
        available = np.where(at >= bits, 0, bits - np.minimum(at, np.uint64(bits)).astype(np.int64))
        kept = np.minimum(count.astype(np.int64), available)
        mask = np.where(
            kept >= 64, ~np.uint64(0), (one << np.minimum(kept, 63).astype(np.uint64)) - one
        )
        field &= mask
        field |= np.where(sign > 0, ~mask, np.uint64(0))
        result[threads] = field.astype(f"u{bits // 8}").view(result.dtype)

    return Step(run)


@opcode("bfi")
def build_insert(machine, instruction):
    """``bfi.type d, a, b, position, length``: the low bits of a replace a field of b"""
    type_ = instruction.type
    if instruction.modifiers != (type_,) or type_ not in ("b32", "b64"):
        return None
    registers, bits = machine.registers, 8 * SIZES[type_]
    d, *sources = instruction.operands
    result = registers.result(d, type_)
    a, b = (registers.source(o, type_) for o in sources[:2])
    position, length = (registers.source(o, "u32") for o in sources[2:])

    def run(threads):
        at = (position[threads] & 0xFF).astype(np.uint64)
        count = np.minimum(length[threads] & 0xFF, bits).astype(np.uint64)
        one = np.uint64(1)
        mask = np.where(count >= 64, ~np.uint64(0), (one << np.minimum(count, 63)) - one)
        shift = np.minimum(at, np.uint64(63))
        mask = np.where(at >= bits, np.uint64(0), mask << shift)
        put = np.where(at >= bits, np.uint64(0), a[threads].astype(np.uint64) << shift)
        result[threads] = ((put & mask) | (b[threads].astype(np.uint64) & ~mask)).astype(
            result.dtype
        )

    return Step(run)


@opcode("prmt")
def build_permute(machine, instruction):
    """``prmt.b32 d, a, b, selector``: four bytes chosen of eight; bit 3 of a choice is its sign"""
    if instruction.modifiers != ("b32",):
        return None
    registers = machine.registers
    d, *sources = instruction.operands
    result = registers.result(d, "b32")
    a, b, selector = (registers.source(o, "b32") for o in sources)

    def run(threads):
        both = b[threads].astype(np.uint64) << np.uint64(32) | a[threads]
        choice = selector[threads]
        found = np.zeros(len(both), np.uint32)
        for n in range(4):
            nibble = choice >> np.uint32(4 * n) & np.uint32(15)
            byte = (both >> (nibble & 7).astype(np.uint64) * np.uint64(8)).astype(
                np.uint32
            ) & np.uint32(255)
            sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
            found |= np.where(nibble & 8, sign, byte) << np.uint32(8 * n)
        result[threads] = found

    return Step(run)


@opcode("selp")
def build_select(machine, instruction):
    """``selp.type d, a, b, p``"""
    type_ = instruction.type
    if len(instruction.modifiers) != 1 or type_ not in DTYPES or type_ == "pred":
        return None
    registers = machine.registers
    d, a, b, p = instruction.operands
    result, a, b = (
        registers.result(d, type_),
        registers.source(a, type_),
        registers.source(b, type_),
    )
    p = registers.source(p, "pred")

    def run(threads):
        result[threads] = np.where(p[threads], a[threads], b[threads])

    return Step(run)


_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def comparison(name: str, is_float: bool):
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


_JOINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@opcode("setp")
def build_compare(machine, instruction):
    """``setp.comparison[.and|or|xor][.ftz].type p[|q], a, b[, c]``"""
    name, *between, type_ = instruction.modifiers
    if type_ in ("bf16", "f16", "bf16x2", "f16x2") or "ftz" in between:
        from .floats import compare_floats

        return compare_floats(machine, instruction)
    function = comparison(name, type_ in ("f32", "f64"))
    if function is None or type_ not in DTYPES or type_ == "pred" or len(between) > 1:
        return None
    return compare(machine, instruction, function, type_, between[0] if between else None)


def compare(machine, instruction, function, type_, join=None):
    """The step of a comparison that writes one predicate or two."""
    registers = machine.registers
    d, a, b, *more = instruction.operands
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, Sink())
    results = [
        None if isinstance(o, Sink) else registers.result(o, "pred") for o in (first, second)
    ]
    a, b = registers.source(a, type_), registers.source(b, type_)
    if (join is None) != (not more) or (join is not None and join not in _JOINED):
        return None
    c = registers.source(more[0], "pred") if more else None

    def run(threads):
        found = function(a[threads], b[threads])
        for result, value in zip(results, (found, ~found)):
            if result is not None:
                result[threads] = value if c is None else _JOINED[join](value, c[threads])

    return Step(run)
