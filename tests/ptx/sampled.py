"""What one program of a launch does, as work for each resource of a GPU.

The launch has its full size, and one program in its middle is executed: programs of whole tiles do
the same work. Registers and spills are read from ptxas.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from triton import knobs

from .counts import SECTOR, Counts
from .launch import check
from .machine import Launch, Machine, Mode
from .program import Instruction, Vector

LINE = 128  # bytes of shared memory in one pass
SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh", "div"}
WARPGROUP = 4  # warps that execute one wgmma


@dataclass(frozen=True)
class Work:
    """One launch. ``dram`` is of all its programs, the rest from ``instructions`` on of one: numbers
    of instructions of warps, of floating-point operations, of passes and of sectors."""

    kernel: str
    blocks: int
    threads: int
    registers: int
    spills: int
    shared: int
    dram: int
    instructions: int
    fp32: int
    special: int
    tensor: int
    wavefronts: int
    sectors: int


class ByTensor(Counts):
    """Counts that also know the sectors of each allocation, loaded and stored."""

    def __init__(self, starts: list[int]):
        super().__init__()
        self.starts, self.each = np.array(starts, np.int64), Counter()

    def global_access(self, addresses, size, warps, load) -> None:
        before = self.sectors
        super().global_access(addresses, size, warps, load)
        self._keep(addresses, load, self.sectors - before)

    def bulk(self, starts, size, load) -> None:
        before = self.sectors
        super().bulk(starts, size, load)
        self._keep(starts, load, self.sectors - before)
        self.wavefronts += -(-len(starts) * size // LINE)

    def _keep(self, addresses, load: bool, sectors: int) -> None:
        if len(addresses):
            owner = int(np.searchsorted(self.starts, addresses[0], "right")) - 1
            self.each[owner, load] += sectors


def sample(launch: Launch) -> Counts:
    """Execute the program in the middle of a launch, with its cluster; what it did."""
    check(launch)
    machine = Machine(launch, launch.cluster, Mode())
    machine.counts = counts = ByTensor(launch.memory.starts)
    machine.run(launch.blocks // 2 // launch.cluster * launch.cluster)
    counts.instructions = machine.hits
    return counts


def work(launch: Launch, counts: ByTensor, registers: int, spills: int) -> Work:
    """A sampled launch as work."""
    hits = [(i, int(n)) for i, n in zip(launch.entry.code, counts.instructions) if n]
    sizes = [allocation.size for allocation in launch.memory.allocations]
    return Work(
        launch.entry.name, launch.blocks, launch.threads, registers, spills, launch.shared_bytes,
        dram(counts.each, sizes, launch.blocks // launch.cluster), sum(n for _, n in hits),
        sum(n for i, n in hits if is_fp32(i)), sum(n for i, n in hits if i.root in SPECIAL),
        sum(n * flops(i) for i, n in hits),
        counts.wavefronts + sum(n * operands(i) for i, n in hits), counts.sectors,
    )  # fmt: skip


def dram(sectors: dict[tuple[int, bool], int], sizes: list[int], programs: int) -> int:
    """The bytes of a launch: what a program asks of each tensor, for all programs, but no more than
    the tensor has, since caches keep what is read again."""
    return sum(min(SECTOR * n * programs, sizes[owner]) for (owner, _), n in sectors.items())


def is_fp32(instruction: Instruction) -> bool:
    """Whether it runs on the units of fp32 products and sums."""
    return instruction.root in ("fma", "add", "sub", "mul") and instruction.type == "f32"


def shape(instruction: Instruction) -> tuple[int, int, int] | None:
    """m, n and k of a product on tensor cores."""
    if instruction.root not in ("mma", "wgmma"):
        return None
    found = re.search(r"\.m(\d+)n(\d+)k(\d+)\.", instruction.opcode)
    return tuple(map(int, found.groups())) if found else None


def flops(instruction: Instruction) -> int:
    """Of one warp on the tensor cores."""
    sizes = shape(instruction)
    if sizes is None:
        return 0
    m, n, k = sizes
    return 2 * m * n * k // (WARPGROUP if instruction.root == "wgmma" else 1)


def operands(instruction: Instruction) -> int:
    """Passes in which a warp's share of a wgmma reads 16-bit operands from shared memory."""
    sizes = shape(instruction)
    if instruction.root != "wgmma" or sizes is None:
        return 0
    m, n, k = sizes
    read = n if isinstance(instruction.operands[1], Vector) else n + m
    return 2 * read * k // LINE // WARPGROUP


def assembled(text: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, of a PTX text, by ptxas."""
    target = re.search(r"^\.target (\w+)", text, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(text)
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", str(source), "-o",
                   str(source.with_suffix(".cubin"))]  # fmt: skip
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", said)))
