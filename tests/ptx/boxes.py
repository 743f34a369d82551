"""What a bulk copy moves of global memory: the box of a tensor map, or bytes in a row."""

import functools
import math

import numpy as np

from .errors import BadAccess, Unsupported
from .flags import UNIT
from .global_memory import Allocation, GlobalMemory
from .shared_memory import swizzled
from .tensor_maps import SWIZZLES, TensorMap


class Run:
    """``size`` bytes in a row."""

    swizzle = 0

    def __init__(self, address: int, size: int):
        if address % UNIT or size % UNIT or not size:
            raise BadAccess(f"a bulk copy of {size} bytes at {address:#x}: wanted multiples of 16")
        self.address, self.size = address, size

    @property
    def rows(self) -> tuple[np.ndarray, int]:
        """(addresses, bytes) of the pieces in global memory."""
        return np.array([self.address]), self.size

    def read(self, memory: GlobalMemory) -> np.ndarray:
        """The bytes."""
        allocation, first = _inside(memory, self.address, self.address + self.size)
        here = slice(first, first + self.size)
        if allocation.written is not None:
            _check_written(allocation, allocation.written[here])
        return allocation.bytes[here].copy()

    def write(self, memory: GlobalMemory, data: np.ndarray) -> None:
        """Write the bytes."""
        allocation, first = _inside(memory, self.address, self.address + self.size)
        here = slice(first, first + self.size)
        allocation.bytes[here] = data
        allocation.wrote(np.array([first]), self.size)
        if allocation.written is not None:
            allocation.written[here] = 1


class Box:
    """The box of a tensor map at some coordinates, innermost first. ``size`` are its bytes in
    shared memory, with what is outside the tensor: only what is inside touches global memory."""

    def __init__(self, tensor: TensorMap, at: tuple[int, ...], rank: int):
        if tensor.rank != rank:
            raise BadAccess(f"a copy of {rank} dimensions by a tensor map of {tensor.rank}")
        self.tensor, self.swizzle = tensor, SWIZZLES[tensor.swizzle]
        shape, inner = _shape(tensor)
        if self.swizzle and inner != self.swizzle:
            raise Unsupported(f"a box with rows of {inner} bytes in a swizzle of {self.swizzle}")
        self.shape, self.size = (*shape, inner), inner * math.prod(shape)
        self._clip(at)

    def _clip(self, at: tuple[int, ...]) -> None:
        """Find what is inside the tensor."""
        tensor, width = self.tensor, self.tensor.element_bytes
        self.address, self.inside, self.counts, self.steps = tensor.address, [], [], []
        for n, (start, size) in enumerate(zip(at, tensor.sizes)):
            step = tensor.element_strides[n] if n else 1  # the first one is ignored
            many = -(-tensor.box[n] // step)
            first = min(max(0, -(start // step)), many)
            last = max(first, min(many, -((start - size) // step)))
            unit, scale = (tensor.strides[n - 1], 1) if n else (width, width)
            self.address += (start + first * step) * unit
            self.inside.insert(0, slice(first * scale, last * scale))
            self.counts.insert(0, (last - first) * scale)
            self.steps.insert(0, step * unit if n else 1)
        self.is_empty = 0 in self.counts

    @property
    def rows(self) -> tuple[np.ndarray, int]:
        """(addresses, bytes) of the pieces in global memory."""
        if self.is_empty:
            return np.zeros(0, np.int64), 0
        starts = np.array([self.address])
        for count, step in zip(self.counts[:-1], self.steps):
            starts = (starts[:, None] + np.arange(count) * step).ravel()
        return starts, self.counts[-1]

    def _window(self, memory: GlobalMemory) -> tuple[Allocation, np.ndarray, np.ndarray | None]:
        """(allocation, the bytes inside the tensor, the flags of those that were written)."""
        reach = sum((count - 1) * step for count, step in zip(self.counts, self.steps))
        allocation, first = _inside(memory, self.address, self.address + reach + 1)

        def seen(array: np.ndarray) -> np.ndarray:
            return np.ndarray(self.counts, np.uint8, array, first, self.steps)

        flags = None if allocation.written is None else seen(allocation.written)
        return allocation, seen(allocation.bytes), flags

    def read(self, memory: GlobalMemory) -> np.ndarray:
        """The bytes as in shared memory before the swizzle, with the fill."""
        nan, inside = self.tensor.nan, tuple(self.inside)
        if any(nan):
            data = np.tile(np.frombuffer(nan, np.uint8), self.size // len(nan)).reshape(self.shape)
        else:
            data = np.zeros(self.shape, np.uint8)
        if not self.is_empty:
            allocation, found, flags = self._window(memory)
            if flags is not None:
                _check_written(allocation, flags)
            data[inside] = found
        return data.reshape(-1)

    def write(self, memory: GlobalMemory, data: np.ndarray) -> None:
        """Write what is inside the tensor."""
        if self.is_empty:
            return
        allocation, found, flags = self._window(memory)
        found[...] = data.reshape(self.shape)[tuple(self.inside)]
        starts, size = self.rows
        allocation.wrote(starts - allocation.start, size)
        if flags is not None:
            flags[...] = 1


def _shape(tensor: TensorMap) -> tuple[tuple[int, ...], int]:
    """(elements of the outer dimensions, outermost first; bytes of a row) of a box."""
    steps = zip(tensor.box[1:], tensor.element_strides[1:])
    outer = tuple(-(-many // step) for many, step in steps)
    return outer[::-1], tensor.box[0] * tensor.element_bytes


def _inside(memory: GlobalMemory, first: int, last: int) -> tuple[Allocation, int]:
    """The allocation of the bytes ``first`` to ``last``, and where in it they begin."""
    allocation = memory.containing(first)
    if allocation is None or last > allocation.start + allocation.size:
        said = "no allocation" if allocation is None else (
            f"no allocation: {allocation.name or 'one'} has {allocation.size} bytes, these are"
            f" {first - allocation.start} to {last - allocation.start} of it")  # fmt: skip
        raise BadAccess(f"a bulk copy of bytes {first:#x} to {last:#x}, which are in {said}")
    return allocation, first - allocation.start


def _check_written(allocation: Allocation, flags: np.ndarray) -> None:
    if not flags.all():
        raise BadAccess(
            f"a bulk copy reads bytes of {allocation.name or 'an allocation'} of"
            f" {allocation.size} bytes, which nobody wrote"
        )


@functools.lru_cache(maxsize=256)
def scattered(swizzle: int, offset: int, size: int) -> np.ndarray:
    """Where each unit of 16 bytes of a copy of ``size`` bytes goes, from its start at ``offset`` of
    1024."""
    units = offset // UNIT + np.arange(size // UNIT)
    return swizzled(units, swizzle) - offset // UNIT
