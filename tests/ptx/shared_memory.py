"""The shared memory of the blocks of a group.

An address below 2^24 is one of the block's own (``shared::cta``). ``mapa`` makes addresses of the
blocks of a cluster: (rank + 1) 2^24 + the block's own address. The first kilobyte is reserved, as
on sm_90, so that an address of zero is wrong.
"""

import numpy as np

from .errors import BadAccess
from .watch import Watch

RESERVED = 1024
WINDOW = 1 << 24


class SharedMemory:
    """``size`` bytes for each block; byte ``o`` of block ``b`` has index ``b * stride + o``."""

    def __init__(self, blocks: int, size: int, cluster: int, watch: Watch):
        self.blocks, self.size, self.cluster, self.watch = blocks, size, cluster, watch
        self.stride = -(-(size + 16) // 128) * 128
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)  # 0xFFFF is a NaN in any type
        self.written = np.zeros(blocks * self.stride, np.uint8)
        self._views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}

    def reset(self) -> None:
        """As before the first instruction of new blocks."""
        self.bytes.fill(0xFF)
        self.written.fill(0)

    def index(
        self, addresses: np.ndarray, blocks: np.ndarray, size: int, align: int = 0
    ) -> np.ndarray:
        """The index of the first byte of accesses of ``size`` bytes by threads of ``blocks``."""
        if (addresses % (align or size)).any():
            wrong = int(addresses[addresses % (align or size) != 0][0])
            raise BadAccess(
                f"address {wrong:#x} in shared memory is no multiple of {align or size}"
            )
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
        return blocks * self.stride + offsets

    def load(self, index: np.ndarray, width: int, count: int, agents: np.ndarray) -> np.ndarray:
        """(threads, count) unsigned elements of ``width`` bytes, read by warps ``agents``."""
        each = index[:, None] + np.arange(width * count)
        self.check_written(each)
        self.watch.read(each, agents)
        return self._views[width][(index // width)[:, None] + np.arange(count)]

    def store(self, index: np.ndarray, width: int, values: np.ndarray, agents: np.ndarray) -> None:
        """Write (threads, count) elements. Of threads with one address the last one wins."""
        count = values.shape[1]
        each = index[:, None] + np.arange(width * count)
        self.watch.write(each, agents)
        self._views[width][(index // width)[:, None] + np.arange(count)] = values
        self.written[each] = 1

    def check_written(self, each: np.ndarray) -> None:
        """BadAccess where a byte was never written."""
        missing = self.written[each] == 0
        if missing.any():
            first = int(each[missing][0])
            raise BadAccess(
                f"reads byte {first % self.stride + RESERVED:#x} of shared memory of block"
                f" {first // self.stride} of the group, which nobody wrote"
            )
