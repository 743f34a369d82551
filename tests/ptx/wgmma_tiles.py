"""The tiles of shared memory that matrix descriptors describe: PTX ISA 9.7.15.5.1.2.

A tile is made of units of 16 bytes: 8 elements of 16 bits or 4 of 32. K-major, a unit holds
neighbours along K; MN-major, along M or N. With W the bytes of the swizzle (128, 64, 32), the
canonical layouts give a unit's offset from the start address, before the swizzle:

    K-major  none     row % 8 * 16 + row / 8 * stride + unit * leading
             W        row % 8 * W  + row / 8 * stride + unit * 16
    MN-major none     unit * stride + k % 8 * 16 + k / 8 * leading
             W        unit % (W / 16) * 16 + unit / (W / 16) * leading + k % 8 * W + k / 8 * stride

The swizzle then XORs the bits of the address from 4 on (3, 2 or 1 of them) with those from 7 on.
"""

from dataclasses import dataclass

import numpy as np

from .errors import BadAccess
from .flags import UNIT
from .shared_memory import RESERVED, swizzled

DEPTH = 32  # bytes along K of one instruction
SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}
_UNUSED = 0b11 << 14 | 0b11 << 30 | 0b111 << 46 | ((1 << 10) - 1) << 52
_WRITTEN = np.uint64(0x0101010101010101)


@dataclass(frozen=True)
class Shape:
    """``rows`` along M or N; elements of ``size`` bytes; ``k_major`` or MN-major."""

    rows: int
    size: int
    k_major: bool

    @property
    def depth(self) -> int:
        """Elements along K."""
        return DEPTH // self.size


@dataclass(frozen=True)
class Descriptor:
    """The fields of a 64-bit matrix descriptor, in bytes: PTX ISA 9.7.15.5.1.2.2."""

    start: int
    leading: int
    stride: int
    base: int
    width: int

    @classmethod
    def of(cls, bits: int) -> "Descriptor":
        """The fields of a descriptor; BadAccess where bits that have no meaning are set."""
        if bits & _UNUSED:
            raise BadAccess(f"matrix descriptor {bits:#018x} has bits set that have no meaning")
        fields = [(bits >> at & 0x3FFF) << 4 for at in (0, 16, 32)]
        return cls(*fields, bits >> 49 & 7, SWIZZLES[bits >> 62])


def _check(at: Descriptor, shape: Shape) -> None:
    """BadAccess where the swizzle's pattern does not start where base offset 0 means it to."""
    if at.base:
        raise BadAccess(f"matrix descriptor with base offset {at.base}: only 0 is understood")
    width = at.width
    if not width:
        return
    atom, inner = 8 * width, at.start % width
    along = DEPTH if shape.k_major else min(width, shape.rows * shape.size)
    used = [at.stride] if not shape.k_major or shape.rows > 8 else []
    if not shape.k_major and shape.rows * shape.size > width:
        used.append(at.leading)
    if at.start % atom >= width or any(offset % atom for offset in used):
        raise BadAccess(
            f"matrix descriptor from {at.start:#x}, leading {at.leading}, stride {at.stride}: the"
            f" pattern of the {width}-byte swizzle must start at multiples of {atom}"
        )
    if inner + along > width:
        raise BadAccess(
            f"matrix descriptor from {at.start:#x}: {along} bytes from byte {inner} of a row"
            f" of the {width}-byte swizzle"
        )


def _offsets(at: Descriptor, shape: Shape) -> np.ndarray:
    """The offsets of a tile's units before the swizzle: (rows, 2) or (units, depth)."""
    width = at.width
    if shape.k_major:
        row, unit = np.arange(shape.rows)[:, None], np.arange(DEPTH // UNIT)
        if width:
            return row % 8 * width + row // 8 * at.stride + unit * UNIT
        return row % 8 * UNIT + row // 8 * at.stride + unit * at.leading
    unit = np.arange(shape.rows * shape.size // UNIT)[:, None]
    k = np.arange(shape.depth)
    if not width:
        return unit * at.stride + k % 8 * UNIT + k // 8 * at.leading
    wide = width // UNIT
    across = unit % wide * UNIT + unit // wide * at.leading
    return across + k % 8 * width + k // 8 * at.stride


def addresses(bits: int, shape: Shape) -> np.ndarray:
    """The shared addresses of a tile's units, as its descriptor says: (rows, 2) or (units, depth)."""
    at = Descriptor.of(bits)
    _check(at, shape)
    return swizzled((at.start + _offsets(at, shape)) // UNIT, at.width) * UNIT


class Tiles:
    """The tiles in a machine's shared memory. What a descriptor means is worked out once."""

    def __init__(self, machine):
        self.shared = machine.shared
        self.units_per_block = self.shared.stride // UNIT
        self.data = self.shared.bytes.view(np.complex128)  # any type of 16 bytes: it is only copied
        self.written = self.shared.written.view(np.uint64).reshape(-1, 2)
        self._known: dict[tuple, np.ndarray] = {}

    def units(self, descriptors: np.ndarray, shape: Shape, blocks: np.ndarray) -> np.ndarray:
        """(n, ...) numbers of the units in shared memory, for descriptors (n,) of blocks (n,)."""
        tables = [self._table(int(bits), shape) for bits in descriptors]
        whole = tables[0][None] if len(tables) == 1 else np.stack(tables)
        return whole + (blocks * self.units_per_block)[:, None, None]

    def _table(self, bits: int, shape: Shape) -> np.ndarray:
        key = (bits, shape)
        if key not in self._known:
            at = addresses(bits, shape) - RESERVED
            if at.min() < 0 or at.max() + UNIT > self.shared.size:
                raise BadAccess(
                    f"matrix descriptor {bits:#018x} leads from {at.min() + RESERVED:#x} to"
                    f" {at.max() + UNIT + RESERVED:#x}, outside the block's {self.shared.size} bytes"
                    f" of shared memory from {RESERVED:#x}"
                )
            self._known[key] = at // UNIT
        return self._known[key]

    def read(self, units: np.ndarray, shape: Shape) -> np.ndarray:
        """(n, rows, depth) unsigned elements; BadAccess where nobody wrote them."""
        if (self.written.take(units.ravel(), axis=0) != _WRITTEN).any():
            self.shared.check_written(units[..., None] * UNIT + np.arange(UNIT))
        found = self.data.take(units).view(f"u{shape.size}")
        if shape.k_major:
            return found
        parts = found.reshape(len(units), -1, shape.depth, UNIT // shape.size)
        return parts.swapaxes(2, 3).reshape(len(units), shape.rows, shape.depth)
