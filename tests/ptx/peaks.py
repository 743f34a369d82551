"""The clocks that work takes at the peaks of a GPU: a lower bound of a model, no measurement.

Each resource is taken as if it were never idle; the clocks of a launch are those of the resource
that needs most, and a case is the sum of its launches. Latency, and what ptxas makes of the PTX,
are not in it.
"""

from dataclasses import dataclass

from benchmarks.predict import DEVICES

from .counts import SECTOR
from .sampled import Work

RESOURCES = ("dram", "l2", "issue", "fp32", "special", "tensor", "shared")
WARP, FILE, THREADS, BLOCKS = 32, 65536, 2048, 32  # registers, threads and programs of a processor
RESERVED = 1024  # bytes of shared memory that CUDA takes for each program


@dataclass(frozen=True)
class Peaks:
    """One GPU. ``dram`` bytes a clock of the device, ``l2`` too; of a processor in a clock: ``port`` bytes
    from the L2 cache, ``issue`` instructions of warps, ``fp32`` and ``special`` lanes, ``tensor``
    flops of 16-bit products, ``shared`` bytes it has."""

    name: str
    processors: int
    dram: float
    l2: float
    port: float
    issue: int
    fp32: int
    special: int
    tensor: int
    shared: int


def _peaks(name: str, processors: int, fp32: int, tensor: int, shared: int) -> Peaks:
    device = DEVICES[name]
    clock = device.peak / processors / tensor  # at which the data sheet gives its peak
    return Peaks(
        name, processors, device.bandwidth / clock, 5120, 64, 4, fp32, 16, tensor, shared << 10
    )


# bandwidth and dense bf16 peak: data sheets of A100 SXM 80 GB and H200 SXM, in benchmarks/predict.py.
# Processors, tensor flops, shared memory, and the L2 cache's 5,120 bytes a clock: NVIDIA's A100 and
# H100 whitepapers (none gives the L2 cache of the H100: A100's is taken). Lanes: CUDA C++ Programming
# Guide, throughput of arithmetic instructions. The port, 64 bytes: Jia et al. 2018, of a V100
PEAKS = {
    "sm80": _peaks("a100", 108, 64, 2048, 164),
    "sm90": _peaks("h200", 132, 128, 4096, 228),
}


def resident(work: Work, peaks: Peaks) -> int:
    """Programs that a processor holds at a time; 0 where not one fits."""
    warps = work.threads // WARP
    file = -(-work.registers * WARP // 256) * 256 * warps  # given to warps by 256
    return min(
        FILE // file, peaks.shared // (work.shared + RESERVED), THREADS // work.threads, BLOCKS
    )


def clocks(work: Work, peaks: Peaks) -> dict[str, float]:
    """The clocks of each resource for one launch. What a processor has is needed by the processor
    with most programs."""
    most = -(-work.blocks // peaks.processors)
    moved = work.sectors * SECTOR
    return {
        "dram": work.dram / peaks.dram,
        "l2": max(moved * work.blocks / peaks.l2, moved * most / peaks.port),
        "issue": work.instructions * most / peaks.issue,
        "fp32": work.fp32 * WARP * most / peaks.fp32,
        "special": work.special * WARP * most / peaks.special,
        "tensor": work.tensor * most / peaks.tensor,
        "shared": float(work.wavefronts * most),
    }


@dataclass(frozen=True)
class Estimate:
    """A case: its clocks, the sum over all resources, the resource that binds the longest launch, the share of
    the clocks in which instructions are issued, programs a processor, waves of the longest launch."""

    clocks: float
    all: float
    bound: str
    issue: float
    resident: int
    waves: float


def estimate(works: list[Work], peaks: Peaks) -> Estimate:
    """The launches of a case, one after another."""
    each = [clocks(work, peaks) for work in works]
    longest = max(range(len(each)), key=lambda n: max(each[n].values()))
    total = sum(max(found.values()) for found in each)
    held = resident(works[longest], peaks)
    return Estimate(
        total, sum(sum(found.values()) for found in each),
        max(RESOURCES, key=each[longest].get), sum(found["issue"] for found in each) / total,
        held, works[longest].blocks / (peaks.processors * max(held, 1)),
    )  # fmt: skip


def floor(bytes_: float, flops: float, bits: int, peaks: Peaks) -> float:
    """The clocks of a case that the Traffic and Flops lines of a kernel's file promise."""
    rate = peaks.tensor if bits == 16 else 2 * peaks.fp32
    return max(bytes_ / peaks.dram, flops / rate / peaks.processors)
