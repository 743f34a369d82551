"""Global memory: the real memory of the arguments, with the bounds and the state of each byte."""

import bisect
import ctypes

import numpy as np

from .errors import BadAccess

SPACE = "global memory"


class Allocation:
    """``size`` bytes from ``start``. ``written`` is a flag a byte, or None where all are."""

    def __init__(self, start: int, size: int, is_written: bool = True, name: str = ""):
        self.start, self.size, self.name = start, size, name
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
        self.written = None if is_written else np.zeros(size, np.uint8)
        self._views = {1: self.bytes}

    def view(self, width: int) -> np.ndarray:
        """The whole elements of ``width`` bytes."""
        if width not in self._views:
            whole = self.size // width * width
            self._views[width] = self.bytes[:whole].view(f"u{width}")
        return self._views[width]


class GlobalMemory:
    """The allocations that a launch may touch."""

    def __init__(self):
        self.allocations: list[Allocation] = []
        self.starts: list[int] = []

    def add(self, allocation: Allocation) -> Allocation:
        at = bisect.bisect(self.starts, allocation.start)
        self.starts.insert(at, allocation.start)
        self.allocations.insert(at, allocation)
        return allocation

    def load(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """(threads, count) unsigned elements of ``width`` bytes."""
        found = np.empty((len(addresses), count), f"u{width}")
        for here, allocation, offsets in self._parts(addresses, width * count):
            at = (offsets // width)[:, None] + np.arange(count)
            if allocation.written is not None:
                each = offsets[:, None] + np.arange(width * count)
                self._check_written(allocation, each)
            found[here] = allocation.view(width)[at]
        return found

    def store(self, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        """Write (threads, count) elements. Of threads with one address the last one wins."""
        count = values.shape[1]
        for here, allocation, offsets in self._parts(addresses, width * count):
            at = (offsets // width)[:, None] + np.arange(count)
            allocation.view(width)[at] = values[here]
            if allocation.written is not None:
                allocation.written[offsets[:, None] + np.arange(width * count)] = 1

    def _check_written(self, allocation: Allocation, each: np.ndarray) -> None:
        missing = allocation.written[each] == 0
        if missing.any():
            first = int(each[missing][0])
            raise BadAccess(
                f"reads byte {first} of {allocation.name or 'an allocation'} of {allocation.size}"
                " bytes, which nobody wrote"
            )

    def _parts(self, addresses: np.ndarray, size: int):
        """(which threads, allocation, offsets in it); errors for what is in none or misaligned."""
        if len(addresses) == 0:
            return
        if (addresses % size).any():
            wrong = int(addresses[addresses % size != 0][0])
            raise BadAccess(f"address {wrong:#x} in {SPACE} is no multiple of {size}")
        low, high = int(addresses.min()), int(addresses.max()) + size
        allocation = self.containing(low)
        if allocation is not None and high <= allocation.start + allocation.size:
            yield slice(None), allocation, addresses - allocation.start
            return
        owner = np.searchsorted(np.array(self.starts, np.int64), addresses, "right") - 1
        for n in np.unique(owner):
            here = np.flatnonzero(owner == n)
            allocation = self.allocations[n] if n >= 0 else None
            offsets = addresses[here] - (allocation.start if allocation else 0)
            if allocation is None or (offsets + size > allocation.size).any():
                self._outside(int(addresses[here].max()), size)
            yield here, allocation, offsets

    def containing(self, address: int) -> Allocation | None:
        """The allocation that an address is in."""
        n = bisect.bisect(self.starts, address) - 1
        if n < 0 or address >= self.starts[n] + self.allocations[n].size:
            return None
        return self.allocations[n]

    def _outside(self, address: int, size: int) -> None:
        near = (
            self.allocations[max(0, bisect.bisect(self.starts, address) - 1)]
            if self.starts
            else None
        )
        said = "" if near is None else (
            f"; the nearest is {near.name or 'one'} of {near.size} bytes, this is byte"
            f" {address - near.start} of it")  # fmt: skip
        raise BadAccess(f"{size} bytes at {address:#x} are in no allocation{said}")
