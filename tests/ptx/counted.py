"""What each kernel does when it is executed: ``python -m tests.ptx.counted`` writes it into docs/codegen.md.

The launches are those of ``benchmarks.gpu.kernel_cases`` at sizes that fill whole tiles, so that a
count shows the kernel, not an edge. Each result is compared with plain PyTorch too.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from .emulate import ratio, table
from .pages import put

HEAD = ("kernel", "dtype", "launch", "instructions a warp", "sectors / least", "wavefronts / least",
        "bytes / Traffic")  # fmt: skip
TARGETS = ("sm80", "sm90")


@dataclass
class Row:
    """The counts of one kernel in one case. ``moved`` are the bytes of all requests of the case, and
    ``promised`` those of the Traffic line of the kernel's file."""

    target: str
    dtype: str
    case: str
    kernel: str
    instructions: int
    warps: int
    sectors: int
    least: int
    wavefronts: int
    free: int
    moved: int
    promised: float


def sizes():
    """Shapes that whole tiles fill, small enough for the machine."""
    from benchmarks.gpu.kernel_case import Sizes

    return Sizes(m=256, k=512, inner=1024, batch=1, heads=2, queries=128, dim=64)


def rows(target: str, dtype: torch.dtype, only: str = "") -> Iterator[Row]:
    """The rows of one target and dtype."""
    from benchmarks.gpu.kernel_cases import cases
    from pelt_fast.kernels import config

    from .triton_launch import on_the_machine

    config.architecture, config.processors = lambda device: target, lambda device: 4
    launched = []
    with on_the_machine(target, watch=lambda *each: launched.append(each)):
        for case in cases(torch.device("cpu"), sizes(), dtype):
            name = f"{case.kernel} {case.name}"
            launched.clear()
            if only in name:
                case.ours()
            moved = sum(counts.loaded + counts.stored for _, counts in launched)
            for launch, counts in launched:
                warps = launch.blocks * launch.threads // 32
                yield Row(
                    target, str(dtype).removeprefix("torch."), name, launch.entry.name,
                    int(counts.instructions.sum()), warps, counts.sectors, counts.least,
                    counts.wavefronts, counts.free, moved, case.bytes,
                )  # fmt: skip


def worst(found: list[Row]) -> str:
    """The worst launch of each kernel and dtype, as Markdown."""
    each: dict[tuple, Row] = {}
    for row in found:
        key = (row.kernel, row.dtype)
        if key not in each or _waste(row) > _waste(each[key]):
            each[key] = row
    lines = [
        (row.kernel, row.dtype, row.case, f"{row.instructions / row.warps:,.0f}",
         ratio(row.sectors, row.least), ratio(row.wavefronts, row.free),
         f"{row.moved / row.promised:.2f}")
        for row in each.values()
    ]  # fmt: skip
    return table(HEAD, lines)


def _waste(row: Row) -> float:
    return max(row.sectors / max(row.least, 1), row.wavefronts / max(row.free, 1))


def collect(target: str, dtype: str) -> list[Row]:
    """The rows of one target and dtype, in a process of its own: tiles are those of one target."""
    command = [sys.executable, "-m", "tests.ptx.counted", "--target", target, "--dtype", dtype]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{target} {dtype}:\n{ran.stderr[-4000:]}")
    return [Row(**json.loads(line)) for line in ran.stdout.splitlines()]


def page() -> None:
    """Write the tables into docs/codegen.md."""
    parts = [
        "## What execution counts", "",
        "`python -m tests.ptx.counted`, the PTX machine of tests/ptx. The worst launch of each kernel and"
        " dtype: instructions a warp; 32-byte sectors of a warp's requests against the least that hold"
        " their bytes; passes of shared memory against those without bank conflicts; bytes of all"
        " requests of the case against the Traffic line of the kernel's file (what is above 1 is read again,"
        " from the L2 cache, or is the workspace of a split).", "",
    ]  # fmt: skip
    for target in TARGETS:
        found = [row for dtype in ("bfloat16", "float32") for row in collect(target, dtype)]
        parts += [f"### {target}, executed", "", worst(found), ""]
    put("counted", parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.counted", description=__doc__)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", default="", help="a part of a case's name")
    options = parser.parse_args()
    if options.target is None:
        page()
        return
    os.environ["TRITON_INTERPRET"] = "0"  # before a kernel is imported
    for row in rows(options.target, getattr(torch, options.dtype), options.only):
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main()
