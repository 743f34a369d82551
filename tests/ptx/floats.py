"""Floats: arithmetic with the rounding that PTX states, PTX ISA 9.7.3 and 9.7.4.

bf16 is kept as its 16 bits; a result of it is computed in fp32 and rounded to nearest even.
"""

import numpy as np

from .arithmetic import elementwise, integer, integer_product
from .decode import opcode

TINY = np.float32(2.0**-126)  # the smallest normal fp32


def flush(x: np.ndarray) -> np.ndarray:
    """``.ftz``: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _flushing(function):
    return lambda *x: flush(function(*map(flush, x)))


def fma(a, b, c):
    """a b + c rounded once: the product of two fp32 is exact in fp64."""
    product = a.astype(np.float64) * b.astype(np.float64)
    total = product + c
    found = total.astype(np.float32)
    # the sum was rounded to 53 bits first; where that made a tie of fp32, its error decides
    bits = total.view(np.uint64) & np.uint64(0x1FFFFFFF)
    tie = bits == 0x10000000
    if tie.any():
        shifted = total - product
        error = (product - (total - shifted)) + (c - shifted)
        moved = np.where(error > 0, np.nextafter(total, np.inf), np.nextafter(total, -np.inf))
        found = np.where(tie & (error != 0), moved.astype(np.float32), found)
    return found


def approximate(function):
    """A function of fp32 that is computed in fp64 and rounded: inside every documented error."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def smaller(a, b):
    """min of PTX: of a number and a NaN the number."""
    return np.fmin(a, b)


def larger(a, b):
    """max of PTX: of a number and a NaN the number."""
    return np.fmax(a, b)


_FUNCTIONS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "min": smaller,
    "max": larger, "neg": np.negative, "abs": np.abs, "fma": fma, "mad": fma, "sqrt": np.sqrt,
    "rcp": lambda x: np.float32(1) / x,
    "ex2": approximate(np.exp2), "lg2": approximate(np.log2), "tanh": approximate(np.tanh),
    "sin": approximate(np.sin), "cos": approximate(np.cos),
    "rsqrt": approximate(lambda x: 1 / np.sqrt(x)),
}  # fmt: skip
_ROUNDINGS = {"rn", "approx", "full"}


@opcode("add", "sub", "mul", "div", "min", "max", "neg", "abs", "fma", "sqrt", "rcp", "ex2", "lg2",
        "tanh", "sin", "cos", "rsqrt")  # fmt: skip
def build_float(machine, instruction):
    """``op[.rounding][.ftz].f32 d, a, b``, or the integer instruction of that name"""
    root, modifiers = instruction.root, instruction.modifiers
    if root == "mul" and (found := integer_product(machine, instruction)):
        return found
    if root in ("add", "sub", "div", "min", "max", "neg", "abs") and (
        found := integer(machine, instruction)
    ):
        return found
    *how, type_ = modifiers
    if type_ != "f32" or not set(how) <= _ROUNDINGS | {"ftz"}:
        return None
    function = _FUNCTIONS[root]
    return elementwise(
        machine, instruction, _flushing(function) if "ftz" in how else function, "f32"
    )


def compare_floats(machine, instruction):
    """setp of 16-bit floats, and with ``.ftz``."""
    return None
