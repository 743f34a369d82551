"""What a launch did: instructions, sectors of global memory, bank conflicts, bytes."""

import numpy as np

SECTOR, BANKS, BANK = 32, 32, 4
ROW = BANKS * BANK
MOST_KNOWN = 4096


class Counts:
    """Counts of one launch; ``on`` is False in runs whose counts nobody asks for.

    ``sectors`` are the 32-byte sectors that requests of warps touched, ``least`` what as many bytes
    need at least. ``wavefronts`` are the passes of shared memory, ``free`` what they would be
    without bank conflicts.
    """

    def __init__(self, on: bool = True):
        self.on = on
        self.loaded = self.stored = 0
        self.sectors = self.least = 0
        self.wavefronts = self.free = 0
        self._known: dict[tuple, tuple[int, int]] = {}  # accesses that came before

    def global_access(
        self, addresses: np.ndarray, size: int, warps: np.ndarray, load: bool
    ) -> None:
        """Threads of warps access ``size`` bytes each."""
        if not self.on or len(addresses) == 0:
            return
        first = addresses // SECTOR
        key = warps * (1 << 44) + first % (1 << 44)
        self.sectors += (
            len(np.unique(key)) if size <= SECTOR else len(np.unique(key)) * (size // SECTOR)
        )
        places = np.unique(warps * (1 << 48) + addresses % (1 << 48))
        per_warp = np.bincount((places >> 48).astype(np.int64))
        self.least += int((-(-per_warp * size // SECTOR)).sum())
        if load:
            self.loaded += len(places) * size
        else:
            self.stored += len(places) * size

    def bulk(self, starts: np.ndarray, size: int, load: bool) -> None:
        """A bulk copy moves ``size`` bytes from each of some addresses of global memory."""
        if not self.on or not size:
            return
        first, last = starts // SECTOR, (starts + size - 1) // SECTOR
        each = first[:, None] + np.arange(int((last - first).max()) + 1)
        self.sectors += len(np.unique(each[each <= last[:, None]]))
        self.least += -(-len(starts) * size // SECTOR)
        if load:
            self.loaded += len(starts) * size
        else:
            self.stored += len(starts) * size

    def shared_access(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        """Threads of warps access ``size`` bytes each, at most 128 bytes of them in one pass."""
        if not self.on or len(addresses) == 0:
            return
        first = int(addresses[0]) // ROW * ROW  # the banks are the same from any multiple of it
        key = (size, (addresses - first).tobytes(), warps.tobytes())
        if key not in self._known:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[key] = passes(addresses, size, warps)
        wavefronts, free = self._known[key]
        self.wavefronts += wavefronts
        self.free += free


def passes(addresses: np.ndarray, size: int, warps: np.ndarray) -> tuple[int, int]:
    """The passes of one access of shared memory, and what they would be without conflicts."""
    words = max(1, size // BANK)
    lanes = max(1, BANKS // words)  # threads served in one pass
    starts = np.flatnonzero(np.r_[True, warps[1:] != warps[:-1]])
    order = np.arange(len(addresses)) - np.repeat(starts, np.diff(np.r_[starts, len(addresses)]))
    group = warps * BANKS + order // lanes
    word = (addresses // BANK)[:, None] + np.arange(words)
    each = np.unique((group[:, None] << 40) + word)
    bank = (each >> 40) * BANKS + each % BANKS
    many = np.bincount(bank, minlength=(int(each[-1] >> 40) + 1) * BANKS)
    most = many.reshape(-1, BANKS).max(axis=1)
    return int(most.sum()), int(np.count_nonzero(most))
