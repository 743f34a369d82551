"""Global memory: the real memory of the arguments, with the bounds and the state of each byte."""

import bisect
import ctypes

import numpy as np

from .errors import BadAccess
from .flags import CARRIED

SPACE = "global memory"
_LINE = 16
_MAP = 64  # what tensor maps are aligned to


class Allocation:
    """``size`` bytes from ``start``. ``written`` is a flag a byte, or None where all are.

    ``lines``, for a launch that uses tensor maps: the number of the last write to each 64 bytes
    since it began, 0 where there was none.
    """

    def __init__(self, start: int, size: int, is_written: bool = True, name: str = ""):
        self.start, self.size, self.name = start, size, name
        self.bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
        self.written = None if is_written else np.zeros(size, np.uint8)
        self.lead = start % _LINE  # elements are counted from a multiple of 16
        self.lines: np.ndarray | None = None
        self.writes = 0
        self._views: dict[int, np.ndarray] = {}

    def view(self, width: int) -> np.ndarray:
        """The elements of ``width`` bytes, by their address / ``width``, from ``lead`` before the
        first byte. None crosses the ends: an access is a multiple of its size."""
        if width not in self._views:
            size = -(-(self.size + self.lead) // width) * width
            memory = (ctypes.c_uint8 * size).from_address(self.start - self.lead)
            self._views[width] = np.frombuffer(memory, np.uint8).view(CARRIED[width])
        return self._views[width]

    def watch_lines(self, wanted: bool) -> None:
        """A launch begins, which wants ``lines`` or not."""
        self.writes, count = 0, (self.start % _MAP + self.size) // _MAP + 1
        self.lines = np.zeros(count, np.int64) if wanted else None

    def wrote(self, offsets: np.ndarray, size: int) -> None:
        """``size`` bytes from each offset were written."""
        if self.lines is None or not size:
            return
        self.writes += 1
        each = np.minimum(offsets[:, None] + np.arange(0, size + _MAP - 1, _MAP),
                          offsets[:, None] + size - 1)  # fmt: skip
        self.lines[(each + self.start % _MAP) // _MAP] = self.writes

    def last_write(self, offset: int, size: int) -> int:
        """The number of the last write to a line of these bytes."""
        first = offset + self.start % _MAP
        return int(self.lines[first // _MAP : -(-(first + size) // _MAP)].max())

    def check_written(self, offsets: np.ndarray, size: int) -> None:
        """BadAccess where one of ``size`` bytes from each offset was never written."""
        each = self.written[offsets[:, None] + np.arange(size)]
        if not each.all():
            row, byte = (int(n[0]) for n in np.nonzero(each == 0))
            raise BadAccess(
                f"reads byte {int(offsets[row]) + byte} of {self.name or 'an allocation'} of"
                f" {self.size} bytes, which nobody wrote"
            )


class GlobalMemory:
    """The allocations that a launch may touch."""

    def __init__(self):
        self.allocations: list[Allocation] = []
        self.starts: list[int] = []

    def replace(self, other: "GlobalMemory") -> None:
        """Have the allocations of another memory."""
        self.allocations[:], self.starts[:] = other.allocations, other.starts

    def add(self, allocation: Allocation) -> Allocation:
        at = bisect.bisect(self.starts, allocation.start)
        self.starts.insert(at, allocation.start)
        self.allocations.insert(at, allocation)
        return allocation

    def load(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        """(threads, count) unsigned elements of ``width`` bytes."""
        size = width * count
        if size not in CARRIED:  # 32 bytes: as 16 and 16
            return self._wide(addresses, width, count)
        found = None
        for here, allocation, offsets in self._parts(addresses, size):
            if allocation.written is not None:
                allocation.check_written(offsets, size)
            values = allocation.view(size)[(offsets + allocation.lead) // size]
            if isinstance(here, slice):
                found = values
                break
            if found is None:
                found = np.empty(len(addresses), CARRIED[size])
            found[here] = values
        if found is None:
            return np.empty((0, count), f"u{width}")
        return found.view(f"u{width}").reshape(-1, count)

    def _wide(self, addresses: np.ndarray, width: int, count: int) -> np.ndarray:
        if (addresses % (width * count)).any():
            self._misaligned(addresses, width * count)
        half = 16 // width
        parts = [self.load(addresses + 16 * n, width, half) for n in range(count // half)]
        return np.concatenate(parts, axis=1)

    def store(self, addresses: np.ndarray, width: int, values: np.ndarray) -> None:
        """Write (threads, count) elements. Of threads with one address the last one wins."""
        size = width * values.shape[1]
        if size not in CARRIED:
            if (addresses % size).any():
                self._misaligned(addresses, size)
            half = 16 // width
            for n in range(0, values.shape[1], half):
                self.store(addresses + n * width, width, values[:, n : n + half])
            return
        carried = np.ascontiguousarray(values).view(CARRIED[size])[:, 0]
        for here, allocation, offsets in self._parts(addresses, size):
            allocation.view(size)[(offsets + allocation.lead) // size] = carried[here]
            allocation.wrote(offsets, size)
            if allocation.written is not None:
                allocation.written[offsets[:, None] + np.arange(size)] = 1

    def _misaligned(self, addresses: np.ndarray, size: int) -> None:
        wrong = int(addresses[addresses % size != 0][0])
        raise BadAccess(f"address {wrong:#x} in {SPACE} is no multiple of {size}")

    def _parts(self, addresses: np.ndarray, size: int):
        """(which threads, allocation, offsets in it); errors for what is in none or misaligned."""
        if len(addresses) == 0:
            return
        if np.bitwise_or.reduce(addresses) & (size - 1):
            self._misaligned(addresses, size)
        allocation = self.containing(int(addresses[0]))
        if allocation is not None:
            offsets = addresses - allocation.start  # a negative one is large without its sign
            if int(offsets.view(np.uint64).max()) + size <= allocation.size:
                yield slice(None), allocation, offsets
                return
        owner = np.searchsorted(np.array(self.starts, np.int64), addresses, "right") - 1
        for n in np.unique(owner):
            here = np.flatnonzero(owner == n)
            allocation = self.allocations[n] if n >= 0 else None
            offsets = addresses[here] - (allocation.start if allocation else 0)
            if allocation is None or offsets.max() + size > allocation.size:
                wrong = np.argmax(offsets) if allocation else 0
                self._outside(int(addresses[here][wrong]), size)
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
