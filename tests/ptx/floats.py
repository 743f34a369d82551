"""fp32 and fp64: arithmetic with the rounding that PTX states, PTX ISA 9.7.3.

A NaN that an operation makes may have any bits here; those of min and max are the canonical NaN.
Approximations are computed in fp64 and rounded: inside every documented error.
"""

import numpy as np

from .arithmetic import elementwise
from .decode import opcode
from .doubles import fma64
from .rounding import (
    CANONICAL,
    MODES,
    downward_zero,
    exact_product_sum,
    exact_quotient,
    exact_root,
    exact_sum,
    fma,
    has_nan,
    rounded_f32,
)

TINY = np.float32(2.0**-126)  # the smallest normal fp32
_UNSIGNED = {np.dtype(np.float32): np.uint32, np.dtype(np.float64): np.uint64}
_NAN = {
    np.dtype(np.float32): np.uint32(CANONICAL["f32"]).view(np.float32),
    np.dtype(np.float64): np.uint64(CANONICAL["f64"]).view(np.float64),
}
OPERANDS = {"fma": 4, "neg": 2, "abs": 2, "sqrt": 2, "rcp": 2, "ex2": 2, "lg2": 2, "tanh": 2,
            "sin": 2, "cos": 2, "rsqrt": 2}  # fmt: skip


def flush(x: np.ndarray) -> np.ndarray:
    """``.ftz`` of fp32: subnormal numbers become zeros of their sign."""
    small = np.abs(x) < TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def flushing(function):
    """A function of fp32 whose arguments and result are flushed."""
    return lambda *x: flush(function(*map(flush, x)))


def saturated(x: np.ndarray) -> np.ndarray:
    """``.sat``: into [0, 1]; a NaN becomes 0."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    return np.fmin(np.fmax(x, zero), one) + zero  # -0 + 0 is 0


def _extreme(function, join):
    """min or max: +0 is larger than -0, and a result that is NaN is the canonical one."""

    def run(a, b):
        found = function(a, b)
        if not found.all():
            zeros, unsigned = (a == 0) & (b == 0), _UNSIGNED[found.dtype]
            found = np.where(zeros, join(a.view(unsigned), b.view(unsigned)).view(a.dtype), found)
        if has_nan(found):
            found[found != found] = _NAN[found.dtype]
        return found

    return run


# of a number and a NaN plain min and max give the number, with .NaN the NaN
smaller, larger = _extreme(np.fmin, np.bitwise_or), _extreme(np.fmax, np.bitwise_and)
smaller_or_nan = _extreme(np.minimum, np.bitwise_or)
larger_or_nan = _extreme(np.maximum, np.bitwise_and)


def approximate(function):
    """A function of fp32 that is computed in fp64 and rounded."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def _approximate_quotient(a, b):
    """``div.approx``: for 2^126 < |b| < 2^128 the result is 0, or NaN where a is infinite."""
    large = np.isfinite(b) & (np.abs(b) > np.float32(2.0**126))
    return np.where(large, a * np.copysign(np.float32(0), b), a / b)


PLAIN = {"neg": np.negative, "abs": np.abs, "min": smaller, "max": larger}
PROPAGATING = {"min": smaller_or_nan, "max": larger_or_nan}
NEAREST = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fma,
           "sqrt": np.sqrt, "rcp": lambda x: 1 / x}  # fmt: skip
APPROXIMATE = {
    "ex2": approximate(np.exp2), "lg2": approximate(np.log2), "tanh": approximate(np.tanh),
    "sin": approximate(np.sin), "cos": approximate(np.cos), "sqrt": np.sqrt,
    "rcp": lambda x: np.float32(1) / x, "rsqrt": approximate(lambda x: 1 / np.sqrt(x)),
    "div": _approximate_quotient,
}  # fmt: skip


def _wide(x):
    return x.astype(np.float64)


_EXACT = {
    "add": lambda a, b: exact_sum(_wide(a), _wide(b)),
    "sub": lambda a, b: exact_sum(_wide(a), -_wide(b)),
    "mul": lambda a, b: _wide(a) * _wide(b),
    "fma": exact_product_sum,
    "div": exact_quotient,
    "sqrt": exact_root,
    "rcp": lambda b: exact_quotient(np.ones_like(b), b),
}
_SUMMANDS = {"add": lambda a, b: (a, b), "sub": lambda a, b: (a, -b),
             "fma": lambda a, b, c: (_wide(a) * _wide(b), c)}  # fmt: skip


def _directed(root: str, mode: str):
    """A function of fp32 that is rounded as ``mode`` says."""
    exact, summands = _EXACT[root], _SUMMANDS.get(root)

    def run(*x):
        found = exact(*x)
        if mode == "rm" and summands:
            found = downward_zero(found, *summands(*x))
        return rounded_f32(found, mode)

    return run


def _single(root: str, how: set[str]):
    """The function of a fp32 instruction without ``.ftz`` and ``.sat``, or None."""
    if root in PLAIN:
        if how == {"NaN"} and root in PROPAGATING:
            return PROPAGATING[root]
        return PLAIN[root] if not how else None
    if not how and root in ("add", "sub", "mul"):
        how = {"rn"}
    if len(how) != 1:
        return None
    (mode,) = how
    if mode == "rn":
        return NEAREST.get(root)
    if mode in MODES:
        return _directed(root, mode) if root in _EXACT else None
    if mode == "full":
        return np.divide if root == "div" else None
    return APPROXIMATE.get(root) if mode == "approx" else None


def _double(root: str, how: set[str]):
    """The function of a fp64 instruction, or None."""
    if root in PLAIN:
        return PLAIN[root] if not how else None
    if how == {"rn"} or (not how and root in ("add", "sub", "mul")):
        return fma64 if root == "fma" else NEAREST.get(root)
    return None


@opcode("add", "sub", "mul", "div", "min", "max", "neg", "abs", "fma", "mad", "sqrt", "rcp", "ex2",
        "lg2", "tanh", "sin", "cos", "rsqrt")  # fmt: skip
def build_float(machine, instruction):
    """``op[.rounding][.ftz][.sat].f32 d, a, b`` and ``op[.rounding].f64 d, a, b``"""
    root = {"mad": "fma"}.get(instruction.root, instruction.root)
    *how, type_ = instruction.modifiers
    wanted = OPERANDS.get(root, 3)
    if type_ not in ("f32", "f64") or len(instruction.operands) != wanted:
        return None
    if len(set(how)) != len(how):
        return None
    if type_ == "f64":
        function = _double(root, set(how))
    else:
        function = _single(root, set(how) - {"ftz", "sat"})
        if "sat" in how and root not in ("add", "sub", "mul", "fma"):
            return None
        if "ftz" in how and root == "tanh":
            return None
    if function is None:
        return None
    if "ftz" in how:
        function = flushing(function)
    if "sat" in how:
        plain = function

        def function(*x):
            return saturated(plain(*x))

    return elementwise(machine, instruction, function, type_)


_TESTS = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: ~np.isnan(x),
    "notanumber": np.isnan,
    "normal": lambda x: np.isfinite(x) & ((x == 0) | (np.abs(x) >= np.finfo(x.dtype).tiny)),
    "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
}


@opcode("testp")
def build_test(machine, instruction):
    """``testp.op.type p, a``; zero is a normal number"""
    if len(instruction.modifiers) != 2 or instruction.type not in ("f32", "f64"):
        return None
    test = _TESTS.get(instruction.modifiers[0])
    if test is None:
        return None
    return elementwise(machine, instruction, test, instruction.type, "pred")


@opcode("copysign")
def build_copysign(machine, instruction):
    """``copysign.type d, a, b``: the sign of a and the size of b"""
    if instruction.modifiers not in (("f32",), ("f64",)):
        return None
    return elementwise(machine, instruction, lambda a, b: np.copysign(b, a), instruction.type)
