"""For the tests of numbers: one instruction on arrays, and rounding in fractions.

Nothing here uses the machine's own arithmetic: ``rounded`` follows the definition of each format.
"""

from fractions import Fraction

import numpy as np

from .programs import execute

DIGITS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}  # fmt: skip
BITS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}


def apply(lines: str, *arrays: np.ndarray, result=np.uint32) -> np.ndarray:
    """``lines`` once for each element: they read registers a, b, c (an array each) and write d.

    Predicates p, q, r and registers t (32 bits) and w (64 bits) are there too.
    """
    count = len(arrays[0])
    threads = -(-count // 32) * 32
    given = [np.resize(array, threads).copy() for array in arrays]
    found = np.zeros(threads, result)
    head, body = [".reg .pred p, q, r;", ".reg .b32 i, t;", ".reg .b64 w, base, at;"], []
    body.append("mov.u32 i, %tid.x;")
    for n, array in enumerate([*given, found]):
        name, size = ("d" if n == len(given) else "abc"[n]), array.dtype.itemsize
        head.append(f".reg .b{max(16, 8 * size)} {name};")
        body.append(f"ld.param.u64 base, [p{n}]; mul.wide.u32 at, i, {size}; add.s64 at, base, at;")
        if name != "d":
            body.append(f"ld.global.b{8 * size} {name}, [at];")
    end = f"st.global.b{8 * found.dtype.itemsize} [at], d;"
    execute("\n".join([*head, *body, lines, end]), *given, found, threads=threads)
    return found[:count]


def rounded(exact: Fraction, type_: str, mode: str = "rn") -> float:
    """A fraction rounded to a format, to nearest even (rn), to zero (rz), down (rm) or up (rp)."""
    if exact == 0:
        return 0.0
    digits, least, most = DIGITS[type_]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    last = Fraction(2) ** (max(exponent, least) - digits + 1)
    low = exact / last // 1
    rest = exact / last - low
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1),
        "rz": exact < 0 and rest > 0, "rm": False, "rp": rest > 0,
    }[mode]  # fmt: skip
    found = (low + up) * last
    largest = (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** most
    if abs(found) > largest:
        stays = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        return float(largest if stays else np.inf) * (1 if exact > 0 else -1)
    return float(found) if found or exact > 0 else -0.0


def number(bits: int, type_: str) -> float:
    """The value of a format's bits, by its definition."""
    digits, least, most = DIGITS[type_]
    width = 8 * np.dtype(BITS[type_]).itemsize
    sign = -1.0 if bits >> (width - 1) else 1.0
    exponent = bits >> (digits - 1) & (2 ** (width - digits) - 1)
    fraction = bits & (2 ** (digits - 1) - 1)
    if exponent == 2 ** (width - digits) - 1:
        return float("nan") if fraction else sign * float("inf")
    if exponent == 0:
        return sign * float(Fraction(fraction) * Fraction(2) ** (least - digits + 1))
    scaled = Fraction(fraction + 2 ** (digits - 1)) * Fraction(2) ** (exponent - most - digits + 1)
    return sign * float(scaled)


def random_bits(type_: str, count: int, seed: int = 0, near: int | None = None) -> np.ndarray:
    """Finite floats as bits; ``near``: exponents at most that far from that of 1."""
    digits, _, most = DIGITS[type_]
    random = np.random.default_rng(seed)
    low, high = (0, 2 * most) if near is None else (most - near, most + near)
    exponent = random.integers(low, high + 1, count, dtype=np.uint64)
    fraction = random.integers(0, 2 ** (digits - 1), count, dtype=np.uint64)
    short = random.integers(0, 2, count, dtype=np.uint64)  # half of them have few bits: ties
    fraction = np.where(short == 1, fraction & np.uint64(7 << max(0, digits - 4)), fraction)
    width = 8 * np.dtype(BITS[type_]).itemsize
    sign = random.integers(0, 2, count, dtype=np.uint64) << np.uint64(width - 1)
    return (sign | exponent << np.uint64(digits - 1) | fraction).astype(BITS[type_])
