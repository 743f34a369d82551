"""Integers, logic, shifts and selection: PTX ISA 9.7.1, 9.7.6, 9.7.8."""

import numpy as np

from .decode import Step, opcode
from .program import SIZES, Immediate
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


@opcode("add", "sub", "min", "max", "neg", "abs", "div", "rem")
def build_integer(machine, instruction):
    """``op.type d, a[, b]`` of integers; ``add.sat.s32`` and ``sub.sat.s32`` clamp"""
    root, type_ = instruction.root, instruction.type
    wanted = 2 if root in ("neg", "abs") else 3
    if type_ not in _INTEGERS or len(instruction.operands) != wanted:
        return None
    if wanted == 2 and type_[0] != "s":
        return None
    if instruction.modifiers == ("sat", "s32") and root in ("add", "sub"):
        return elementwise(machine, instruction, _clamped(_PLAIN[root]), type_)
    if len(instruction.modifiers) != 1:
        return None
    return elementwise(machine, instruction, _PLAIN[root], type_)


def _clamped(function):
    """A function of s32 whose result is clamped."""
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    return lambda a, b: np.clip(function(a.astype(np.int64), b), low, high).astype(np.int32)


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


@opcode("mul", "mad")
def build_product(machine, instruction):
    """``mul.mode.type d, a, b`` and ``mad.mode.type d, a, b, c`` of integers: lo, hi, wide"""
    modifiers = instruction.modifiers
    if (
        len(modifiers) != 2
        or modifiers[0] not in ("lo", "hi", "wide")
        or modifiers[1] not in _INTEGERS
        or len(instruction.operands) != {"mul": 3, "mad": 4}[instruction.root]
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


def _shifted(shift, bits: int, signed: bool):
    """A function that shifts by a u32, of which more than the type has bits is all of them."""

    def run(a, n):
        limited = np.minimum(n, np.uint32(bits - 1)).astype(a.dtype)
        found = shift(a, limited)
        return found if signed else np.where(n >= bits, a.dtype.type(0), found)

    return run


def _shifted_by(shift, bits: int, signed: bool, n: int):
    """The same by a number that is known."""
    n &= 0xFFFFFFFF
    if n >= bits and not signed:
        return np.zeros_like
    count = min(n, bits - 1)
    return lambda a: shift(a, a.dtype.type(count))


@opcode("shl", "shr")
def build_shift(machine, instruction):
    """``shl.type d, a, n``: n is a u32, and is limited to the size of the type"""
    type_ = instruction.type
    kinds = _BITS[1:] if instruction.root == "shl" else (*_INTEGERS, *_BITS[1:])
    if len(instruction.modifiers) != 1 or type_ not in kinds:
        return None
    registers, how = machine.registers, (8 * SIZES[type_], type_[0] == "s")
    d, a, n = instruction.operands
    result, a = registers.result(d, type_), registers.source(a, type_)
    shift = np.left_shift if instruction.root == "shl" else np.right_shift
    if isinstance(n, Immediate):
        known = _shifted_by(shift, *how, n.value)

        def run(threads):
            result[threads] = known(a[threads])
    else:
        function, n = _shifted(shift, *how), registers.source(n, "u32")

        def run(threads):
            result[threads] = function(a[threads], n[threads])

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
