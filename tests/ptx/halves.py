"""f16, bf16 and their pairs f16x2, bf16x2: PTX ISA 9.7.4, each result rounded once.

Operands are bits; a NaN that an operation makes is the canonical NaN, 0x7FFF.
"""

import numpy as np

from .arithmetic import elementwise
from .decode import opcode
from .floats import PLAIN, PROPAGATING, approximate, saturated
from .rounding import SMALLEST, exact_product_sum, rounded_bits, values

HALVES = {"f16": "f16", "bf16": "bf16", "f16x2": "f16", "bf16x2": "bf16"}
_ONE_SIGN = {"neg": lambda bits: bits ^ np.uint16(0x8000), "abs": lambda bits: bits & np.uint16(0x7FFF)}  # fmt: skip
_FUNCTIONS = {
    # a sum or product of two in fp32 may be rounded again: it has 24 >= 2 * 11 + 2 bits
    "add": np.add, "sub": np.subtract, "mul": np.multiply,
    "fma": exact_product_sum, "min": PLAIN["min"], "max": PLAIN["max"],
    "tanh": approximate(np.tanh), "ex2": approximate(np.exp2),
}  # fmt: skip
_ALLOWED = {  # root: modifiers that f16 may have, and those that bf16 may have
    "add": ({"rn", "ftz", "sat"}, {"rn"}), "sub": ({"rn", "ftz", "sat"}, {"rn"}),
    "mul": ({"rn", "ftz", "sat"}, {"rn"}), "fma": ({"rn", "ftz", "sat", "relu"}, {"rn", "relu"}),
    "neg": ({"ftz"}, set()), "abs": ({"ftz"}, set()), "min": ({"ftz", "NaN"}, {"NaN"}),
    "max": ({"ftz", "NaN"}, {"NaN"}), "tanh": ({"approx"}, {"approx"}),
    "ex2": ({"approx"}, {"approx", "ftz"}),
}  # fmt: skip
_REQUIRED = {"fma": {"rn"}, "tanh": {"approx"}, "ex2": {"approx"}}
_OPERANDS = {"fma": 4, "neg": 2, "abs": 2, "tanh": 2, "ex2": 2}


def flushed(bits: np.ndarray, type_: str) -> np.ndarray:
    """``.ftz``: subnormal numbers become zeros of their sign."""
    exponent = np.uint16(0x7C00 if type_ == "f16" else 0x7F80)
    return np.where(bits & exponent == 0, bits & np.uint16(0x8000), bits)


def clamped(x: np.ndarray) -> np.ndarray:
    """``.relu``: a negative number becomes 0, a NaN stays one."""
    return np.where(x <= 0, x.dtype.type(0), x)


def of_bits(function, type_: str, how: set[str]):
    """A function of bits from one of fp32 values."""

    def run(*bits):
        if "ftz" in how:
            bits = [flushed(b, type_) for b in bits]
        found = function(*(values(b, type_) for b in bits))
        if "sat" in how:
            found = saturated(found)
        if "relu" in how:
            found = clamped(found)
        found = rounded_bits(found, type_)
        return flushed(found, type_) if "ftz" in how else found

    return run


def pairs(function):
    """A function of packed registers (uint32) from one of their halves."""

    def run(*packed):
        halves = (np.ascontiguousarray(register).view(np.uint16) for register in packed)
        return np.ascontiguousarray(function(*halves)).view(np.uint32)

    return run


def _sign(root: str, type_: str, flush: bool):
    change = _ONE_SIGN[root]
    return (lambda bits: change(flushed(bits, type_))) if flush else change


@opcode("add", "sub", "mul", "fma", "neg", "abs", "min", "max", "tanh", "ex2")
def build_half(machine, instruction):
    """``op[.rn][.ftz][.sat|.relu][.NaN].type d, a, b[, c]`` of 16-bit floats and pairs of them"""
    root, (*given, name) = instruction.root, instruction.modifiers
    if name not in HALVES or len(instruction.operands) != _OPERANDS.get(root, 3):
        return None
    type_, how = HALVES[name], set(given)
    allowed = _ALLOWED[root][type_ == "bf16"]
    if not _REQUIRED.get(root, set()) <= how <= allowed or len(how) != len(given):
        return None
    if {"sat", "relu"} <= how or (name[:2] == "bf" and root == "ex2" and "ftz" not in how):
        return None
    if root in _ONE_SIGN:
        function = _sign(root, type_, "ftz" in how)
    else:
        plain = PROPAGATING[root] if "NaN" in how else _FUNCTIONS[root]
        function = of_bits(plain, type_, how)
    if name.endswith("x2"):
        return elementwise(machine, instruction, pairs(function), "b32")
    return elementwise(machine, instruction, function, "b16")


def decoded(type_: str, flush: bool):
    """A function from bits to fp32 values, flushed where asked."""
    if not flush:
        return lambda bits: values(bits, type_)
    smallest = np.float32(SMALLEST[type_])

    def run(bits):
        found = values(bits, type_)
        return np.where(np.abs(found) < smallest, np.copysign(np.float32(0), found), found)

    return run
