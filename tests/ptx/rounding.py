"""Rounding: one correct rounding from an exact result to any float of PTX, in numpy.

An exact result is carried as a *sticky* fp64: truncated, with its last bit set where anything was
lost. Rounding that once more to 50 bits or fewer, in any direction, is as rounding the exact
result (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums").

16-bit floats are kept as their bits, uint16.
"""

import numpy as np

MODES = ("rn", "rz", "rm", "rp")
SMALLEST = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126}  # normal numbers
LARGEST = {"f16": 65504.0, "bf16": 255 * 2.0**120, "f32": (2 - 2.0**-23) * 2.0**127}
CANONICAL = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
_UNSIGNED = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32}
_DIGITS_28 = np.uint64((1 << 28) - 1)


def has_nan(x: np.ndarray) -> bool:
    """Whether a NaN is among floats: a sum of squares is one then, and only then."""
    total = np.vdot(x, x)
    return bool(total != total)


def bf16_in_fp32(x: np.ndarray) -> np.ndarray:
    """fp32 rounded to bf16, to nearest even, in the high half of each of its uint32; the low half is
    not zero."""
    bits = x.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    if has_nan(x):
        rounded[x != x] = 0x7FFF0000
    return rounded


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 as the bits of bf16, rounded to nearest even; a NaN is 0x7FFF."""
    rounded = bf16_in_fp32(np.ascontiguousarray(x, np.float32))
    return rounded.view(np.uint16)[..., 1::2]


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """The fp32 of bf16's bits."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def f16_bits(x: np.ndarray) -> np.ndarray:
    """fp32 or fp64 as the bits of fp16, rounded to nearest even; a NaN is 0x7FFF."""
    bits = x.astype(np.float16).view(np.uint16)
    nan = x != x
    if nan.any():
        bits[nan] = 0x7FFF
    return bits


def f16_values(bits: np.ndarray) -> np.ndarray:
    """The fp32 of fp16's bits."""
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def values(bits: np.ndarray, type_: str) -> np.ndarray:
    """The fp32 of a 16-bit float's bits."""
    return bf16_values(bits) if type_ == "bf16" else f16_values(bits)


# ---- exact results


def sticky(approximate: np.ndarray, error: np.ndarray) -> np.ndarray:
    """``approximate + error``, where the error is smaller than the last bit, as a sticky fp64."""
    bits = approximate.view(np.uint64)
    moves = (error != 0) & (bits & np.uint64(1) == 0) & np.isfinite(approximate) & ~np.isnan(error)
    if not moves.any():
        return approximate
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(moves, np.nextafter(approximate, towards), approximate)


def two_sum(a, b):
    """a + b as its fp64 and the error of that (Knuth)."""
    total = a + b
    shifted = total - a
    return total, (a - (total - shifted)) + (b - shifted)


def exact_sum(p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """p + c of fp64, sticky."""
    return sticky(*two_sum(p, c))


def exact_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b of fp32, sticky: of a quotient of 29 bits the rest is exact in fp64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    quotient = a / b
    short = (quotient.view(np.uint64) & ~_DIGITS_28).view(np.float64)
    rest = a - short * b
    return sticky(np.where(np.isfinite(quotient), short, quotient), rest * np.sign(b))


def exact_root(a: np.ndarray) -> np.ndarray:
    """The square root of fp32, sticky: the square of 25 bits is exact in fp64."""
    a = a.astype(np.float64)
    root = np.sqrt(a)
    short = (root.view(np.uint64) & ~_DIGITS_28).view(np.float64)
    return sticky(np.where(np.isfinite(root), short, root), a - short * short)


def exact_integer(x: np.ndarray) -> np.ndarray:
    """An integer as a sticky fp64: of 64 bits the last 12 become one."""
    if x.dtype.itemsize < 8:
        return x.astype(np.float64)
    low = x & x.dtype.type(0xFFF)
    short = (x ^ low) | ((low != 0).astype(x.dtype) << x.dtype.type(11))
    large = np.abs(x.astype(np.float64)) >= 2.0**52
    return np.where(large, short, x).astype(np.float64)


def _odd_f32(x: np.ndarray) -> np.ndarray:
    """A sticky fp64 as a sticky fp32."""
    found = x.astype(np.float32)
    back = found.astype(np.float64)
    bits = found.view(np.uint32)
    bits = bits - (np.abs(back) > np.abs(x))
    return (bits | (back != x)).astype(np.uint32).view(np.float32)


# ---- rounding to a type


def _nearest(x: np.ndarray, type_: str) -> np.ndarray:
    """The bits of fp32 or sticky fp64 in a type, to nearest even."""
    if type_ == "f32":
        return x.astype(np.float32).view(np.uint32)
    if type_ == "f16":
        return f16_bits(x)
    return bf16_bits(x if x.dtype == np.float32 else _odd_f32(x))


def rounded_bits(x: np.ndarray, type_: str, mode: str = "rn") -> np.ndarray:
    """The bits of fp32 or sticky fp64 in type f32, f16 or bf16, rounded once, as ``mode`` says."""
    bits = _nearest(x, type_)
    if mode == "rn":
        return bits
    near = bits.view(np.float32) if type_ == "f32" else values(bits, type_)
    near, x = near.astype(np.float64), x.astype(np.float64)
    negative = np.signbit(x)
    if mode == "rz":
        wrong, grow = np.abs(near) > np.abs(x), False
    elif mode == "rm":
        wrong, grow = near > x, negative
    else:
        wrong, grow = near < x, ~negative
    return np.where(wrong, np.where(grow, bits + 1, bits - 1), bits).astype(_UNSIGNED[type_])


def rounded_f32(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    """Sticky fp64 to fp32, rounded once."""
    return rounded_bits(x, "f32", mode).view(np.float32)


# ---- fused multiply-add


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of fp32, rounded once to nearest even: the product is exact in fp64.

    The sum is rounded to 53 bits first. Where that made a tie of two fp32 the error of the sum
    decides; a tie has 28 zeros at its end, also where the result is subnormal.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    found = total.astype(np.float32)
    ending = total.view(np.uint64) & _DIGITS_28
    if ending.all():
        return found
    doubtful = np.flatnonzero(ending == 0)
    doubtful = doubtful[found[doubtful] != total[doubtful]]
    if len(doubtful):
        exact = exact_sum(product[doubtful], c[doubtful].astype(np.float64))
        found[doubtful] = exact.astype(np.float32)
    return found


def exact_product_sum(a, b, c) -> np.ndarray:
    """a b + c of fp32, as a sticky fp64."""
    return exact_sum(np.multiply(a, b, dtype=np.float64), c.astype(np.float64))


def downward_zero(total: np.ndarray, p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A sum p + c towards minus infinity: zero is -0 but for +0 + +0 (IEEE 754, 6.3)."""
    negative = (total == 0) & (np.signbit(p) | np.signbit(c))
    return np.where(negative, -0.0, total)
