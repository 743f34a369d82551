"""The flags of a byte of shared memory, and numbers as wide as an access, to see many at once."""

import numpy as np

# since the last barrier of the byte's block: a warp wrote it, or read it; asynchronous work writes
# it, or reads it. The last two stay until the work is known to all
WROTE, READ, WRITES, READS = 1, 2, 4, 8
SOME_WRITE, SOME_READ = WROTE | WRITES, READ | READS
UNIT = 16  # bytes: the widest access, and what a swizzle keeps together
CARRIED = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # a type as wide as an access

# a flag in each byte of an access; of 16 bytes each half is looked at
MASKS = {
    (flag, size): int.from_bytes(bytes([flag] * min(size, 8)), "little")
    for flag in range(1, 16)
    for size in CARRIED
}
ONLY_WROTE, ONLY_WRITES = (
    {size: np.full(size, flag, np.uint8).view(kind)[0] for size, kind in CARRIED.items()}
    for flag in (WROTE, WRITES)
)
