"""fp64: a b + c rounded once."""

from fractions import Fraction

import numpy as np

from .rounding import exact_sum, two_sum

_SPLITTER = 2.0**27 + 1  # Veltkamp: parts of 26 bits
_MODERATE = (2.0**-400, 2.0**400)  # where no step of the sums below can leave the range


def _two_product(a, b):
    """a b as its fp64 and the error of that (Dekker)."""
    product = a * b
    scaled_a, scaled_b = a * _SPLITTER, b * _SPLITTER
    high_a = scaled_a - (scaled_a - a)
    high_b = scaled_b - (scaled_b - b)
    low_a, low_b = a - high_a, b - high_b
    rest = high_a * high_b - product
    return product, low_a * low_b + (rest + high_a * low_b + low_a * high_b)


def _exact_fma(a: float, b: float, c: float) -> float:
    """One fused multiply-add in fractions."""
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c  # the sign of zero
    try:
        return float(exact)
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def fma64(a, b, c):
    """a b + c of fp64 rounded once (Boldo and Melquiond); very large and small ones in fractions."""
    product, low = _two_product(a, b)
    high, middle = two_sum(c, low)
    total, rest = two_sum(product, high)
    found = total + exact_sum(middle, rest)
    found = np.where(np.isfinite(found) & (found != 0), found, a * b + c)
    sizes = np.abs(np.stack([a, b, c]))
    rare = ((sizes < _MODERATE[0]) & (sizes != 0)) | (sizes > _MODERATE[1])
    for n in np.flatnonzero(rare.any(axis=0) & np.isfinite(sizes).all(axis=0)):
        found[n] = _exact_fma(float(a[n]), float(b[n]), float(c[n]))
    return found
