"""The shared memory of the blocks of a group.

An address below 2^24 is one of the block's own (``shared::cta``). ``mapa`` makes addresses of the
blocks of a cluster: (rank + 1) 2^24 + the block's own address. The first kilobyte is reserved, as
on sm_90, so that an address of zero is wrong.
"""

import numpy as np

from .errors import BadAccess, BadBarrier
from .flags import CARRIED, UNIT
from .watch import Watch

RESERVED = 1024
WINDOW = 1 << 24
OPAQUE = 2  # the flag in ``written`` of an mbarrier's bytes: 1 is written, 0 is not
_WRITTEN = {n: np.ones(n, np.uint8).view(kind)[0] for n, kind in CARRIED.items()}


def swizzled(units: np.ndarray, width: int) -> np.ndarray:
    """Where the 16-byte units of addresses are in a swizzle of ``width`` bytes: PTX ISA 5.5.6. Bits
    4 to 6 of an address are mixed with bits 7 to 9 (128 bytes), 4 and 5 with 7 and 8 (64 bytes), 4
    with 7 (32 bytes)."""
    return units ^ (units >> 3 & width // UNIT - 1) if width else units


class SharedMemory:
    """``size`` bytes for each block; byte ``o`` of block ``b`` has index ``b * stride + o``."""

    def __init__(self, blocks: int, size: int, cluster: int, watch: Watch):
        self.blocks, self.size, self.cluster, self.watch = blocks, size, cluster, watch
        self.stride = -(-(size + 16) // 128) * 128
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)  # 0xFFFF is a NaN in any type
        self.written = np.zeros(blocks * self.stride, np.uint8)
        self._views = {n: self.bytes.view(kind) for n, kind in CARRIED.items()}
        self._flags = {n: self.written.view(kind) for n, kind in CARRIED.items()}
        self.mbarriers = 0  # how many there are

    def reset(self) -> None:
        """As before the first instruction of new blocks."""
        self.bytes.fill(0xFF)
        self.written.fill(0)
        self.mbarriers = 0

    def index(
        self, addresses: np.ndarray, blocks: np.ndarray, size: int, align: int = 0
    ) -> np.ndarray:
        """The index of the first byte of accesses of ``size`` bytes by threads of ``blocks``."""
        align = align or size
        if np.bitwise_or.reduce(addresses) & (align - 1):
            wrong = int(addresses[addresses % align != 0][0])
            raise BadAccess(f"address {wrong:#x} in shared memory is no multiple of {align}")
        offsets = addresses - RESERVED
        # a negative offset is a large one without a sign
        if len(offsets) and int(offsets.view(np.uint64).max()) + size > self.size:
            blocks, offsets = self._elsewhere(addresses, blocks, size)
        return blocks * self.stride + offsets

    def _elsewhere(self, addresses: np.ndarray, blocks: np.ndarray, size: int):
        """(blocks, offsets) of accesses some of which are not of the thread's own block."""
        window = addresses // WINDOW
        if window.any():
            own = blocks - blocks % self.cluster
            if (window > self.cluster).any():
                raise BadAccess(
                    f"block {int(window.max()) - 1} is not in a cluster of {self.cluster}"
                )
            blocks = np.where(window > 0, own + window - 1, blocks)
            addresses = addresses % WINDOW
        offsets = addresses - RESERVED
        if (offsets < 0).any() or (offsets + size > self.size).any():
            wrong = int(addresses[(offsets < 0) | (offsets + size > self.size)][0])
            raise BadAccess(
                f"{size} bytes at {wrong:#x} are outside the block's {self.size} bytes of shared memory"
                f" from {RESERVED:#x}"
            )
        return blocks, offsets

    def load(self, index: np.ndarray, width: int, count: int, agents: np.ndarray) -> np.ndarray:
        """(threads, count) unsigned elements of ``width`` bytes, read by warps ``agents``."""
        size = width * count
        if size not in CARRIED:
            each = index[:, None] + np.arange(size)
            self.check_written(each)
            self.watch.read(each, agents)
            return self._views[width][(index // width)[:, None] + np.arange(count)]
        at = index // size
        if np.count_nonzero(self._flags[size][at] != _WRITTEN[size]):
            self.check_written(index[:, None] + np.arange(size))
        self.watch.read_at(index, size, agents)
        return self._views[size][at].view(f"u{width}").reshape(-1, count)

    def store(self, index: np.ndarray, width: int, values: np.ndarray, agents: np.ndarray) -> None:
        """Write (threads, count) elements. Of threads with one address the last one wins."""
        size = width * values.shape[1]
        if size not in CARRIED:
            self.watch.write(index[:, None] + np.arange(size), agents)
        else:

            def new() -> np.ndarray:
                return np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)

            def same() -> np.ndarray:
                return self.bytes.reshape(-1, size)[index // size] == new()

            self.watch.write_at(index, size, agents, same, new)
        self.put(index, width, values)

    def put(self, index: np.ndarray, width: int, values: np.ndarray) -> None:
        """Write (threads, count) elements that ``watch`` knows of already."""
        size = width * values.shape[1]
        if size in CARRIED:
            values = np.ascontiguousarray(values).view(CARRIED[size])[:, 0]
            at = index // size
        else:
            size, at = width, (index // width)[:, None] + np.arange(values.shape[1])
        flags = self._flags[size]
        if self.mbarriers and (flags[at].view(np.uint8) & OPAQUE).any():
            raise BadBarrier("writes to the bytes of an mbarrier")
        self._views[size][at] = values
        flags[at] = _WRITTEN[size]

    def check_written(self, each: np.ndarray) -> None:
        """BadAccess where a byte was never written."""
        missing = self.written[each] != 1
        if missing.any():
            first = int(each[missing][0])
            if self.written[first] == OPAQUE:
                raise BadBarrier("reads the bytes of an mbarrier")
            raise BadAccess(
                f"reads byte {first % self.stride + RESERVED:#x} of shared memory of block"
                f" {first // self.stride} of the group, which nobody wrote"
            )
