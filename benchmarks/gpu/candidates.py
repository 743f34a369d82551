"""The tiles that tuning tries for each table, and which case of ``kernel_cases`` reads which table.

A tile is one compilation for each case that reads its table. The programs a processor that a split
aims at are no constant of a kernel: they are tried on a tile that is compiled already.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from benchmarks.common import load, paths_of
from pelt_fast.kernels import config
from pelt_fast.kernels.tile import HALF, Tile
from pelt_fast.kernels.tiles import TABLES

from .kernel_case import KernelCase, Sizes
from .kernel_cases import cases

PROGRAMS = (2, 4, 8)
SPLIT = ("rank_down", "rank_down_norm", "rank_down_bwd", "rank_down_bwd_norm", "rank_up_bwd",
         "prefix_bwd", "prefix_bwd_dropped", "routed_down", "routed_down_bwd",
         "routed_up_bwd")  # fmt: skip

# the family of cases that reads a table; first the kernels that are farthest from their floor
FAMILY = {
    "prefix_bwd": "heads",
    "prefix_bwd_dropped": "heads",
    "rank_up_bwd": "low_rank",
    "prefix_short": "heads",
    "prefix": "heads",
    "rank_down_norm": "norms",
    "rank_down": "low_rank",
    "rank_down_bwd": "low_rank",
    "norm": "norms",
    "rank_down_bwd_norm": "norms",
    "adapter": "adapters",
    "widened_ffn": "widened",
    "rank_up": "low_rank",
    "tail_gemm": "tail",
    "tail_gemm_masked": "tail",
    "tail_gemm_descriptor": "tail",
    "routed_up_bwd": "routed",
    "routed_down": "routed",
    "routed_down_bwd": "routed",
    "routed_up": "routed",
}

# table: the dims of a block, blocks -> (warps, stages). Left out is what on sm90 spills, does not
# fit or has a race of asynchronous work (tests/codegen reads machine code, tests/ptx executes PTX)
THREE = ((4, 2), (4, 4), (8, 3))
TWO = ((4, 2), (8, 2))
WIDE = ((8, 2), (8, 3))
EVERY = ((4, 1), (4, 2), (8, 1), (8, 2))
PREFIX = dict.fromkeys(((64, 32), (64, 64), (64, 128), (128, 32), (128, 64)), EVERY)
ADAPTER = ((4, 2), (4, 3), (8, 3))
GEMM = {(128, 128, 64): ((8, 3), (8, 4)), (128, 256, 64): ((8, 3), (8, 4)),
        (256, 128, 64): ((8, 3), (8, 4))}  # fmt: skip
MASKED = {(128, 128, 64): ((8, 3), (8, 4)), (128, 128, 32): ((8, 4),), (128, 128, 128): ((8, 2),),
          (128, 64, 64): ((4, 4),), (64, 128, 64): ((4, 4),)}  # fmt: skip
PREFIX_BWD = {
    (32, 64): ((4, 1), (8, 1)),
    (64, 32): EVERY,
    (64, 64): EVERY,
    (64, 128): ((8, 2),),
    (128, 32): ((8, 1), (8, 2)),
    (128, 64): ((8, 1), (8, 2)),
}
GRIDS = {
    "prefix_bwd": ("mn", PREFIX_BWD),
    "prefix_bwd_dropped": ("mn", PREFIX_BWD | dict.fromkeys(((64, 32), (64, 64)), EVERY[2:])),
    "rank_up_bwd": ("mn", {
        (32, 128): ((4, 2),), (32, 256): ((8, 2),), (64, 128): ((4, 2), *WIDE),
        (64, 256): ((4, 3), *WIDE), (64, 512): WIDE, (128, 128): WIDE, (128, 256): WIDE,
    }),
    "prefix_short": ("mn", PREFIX),
    "prefix": ("mn", PREFIX),
    "rank_down_norm": ("mk", {
        (64, 128): THREE, (64, 256): ((8, 2),), (128, 64): THREE, (128, 128): WIDE,
    }),
    "rank_down": ("mk", {
        (32, 256): WIDE, (64, 128): ((4, 2), (4, 4), (8, 4)), (64, 256): WIDE,
        (128, 64): ((4, 2), (4, 4), (8, 4)), (128, 128): WIDE,
    }),
    "rank_down_bwd": ("mk", {
        (64, 64): THREE, (64, 128): THREE, (64, 256): WIDE, (128, 64): THREE, (128, 128): WIDE,
    }),
    "norm": ("mk", {
        (16, 128): ((4, 2), (4, 3), (8, 2)), (16, 256): ((4, 2), (4, 3), (8, 2)),
        (32, 128): ((4, 2), (4, 3), (8, 2)), (32, 256): ((8, 2),),
        (64, 128): ((4, 2), (4, 3), (8, 2)),
    }),
    "rank_down_bwd_norm": ("mk", {
        (64, 64): ((4, 1),), (64, 128): ((4, 1), (8, 1)), (64, 256): ((8, 1),),
        (128, 64): ((4, 1), (8, 1)), (128, 128): ((8, 1),),
    }),
    "adapter": ("mnk", {
        (16, 128, 128): ADAPTER, (32, 128, 64): ((4, 2), *WIDE), (32, 128, 128): WIDE,
        (64, 128, 64): ADAPTER, (64, 128, 128): ADAPTER,
    }),
    "widened_ffn": ("mn", dict.fromkeys(((1, 1024), (2, 1024), (4, 512)), TWO)),
    "rank_up": ("mn", {
        (32, 128): TWO, (32, 256): TWO, (64, 128): TWO, (64, 256): TWO, (128, 128): ((8, 2),),
    }),
    "tail_gemm": ("mnk", GEMM),
    "tail_gemm_masked": ("mnk", MASKED),
    "tail_gemm_descriptor": ("mnk", MASKED),
    "routed_down": ("mk", {(32, 128): THREE, (64, 64): THREE, (64, 128): THREE}),
    "routed_down_bwd": ("mk", {(32, 128): THREE, (64, 64): THREE, (64, 128): THREE}),
    "routed_up": ("mn", {(32, 128): TWO, (64, 64): TWO, (64, 128): TWO}),
    "routed_up_bwd": ("mn", {(32, 64): THREE, (64, 64): THREE, (64, 128): THREE}),
}  # fmt: skip


def in_order(tables: Iterable[str]) -> list[str]:
    """The tables, first those that no committed run has measured whole."""
    try:
        runs = [load(path) for path in paths_of("gpu-tune")]
    except FileNotFoundError:
        runs = []
    measured: set[str] = set()
    for run in runs:
        left = {name.split(" ")[0] for name in run["left"]}
        measured |= {e["kernel"] for e in run["entries"] if "tried" in e} - left
    return sorted(tables, key=lambda table: table in measured)


def candidates(table: str) -> list[Tile]:
    """The tiles that are compiled."""
    dims, blocks = GRIDS[table]
    block_r = 32 if table.startswith(("tail", "routed")) else 64
    fixed = {} if table.startswith(("prefix", "widened")) else {"block_r": block_r}
    return [
        Tile(**{f"block_{dim}": size for dim, size in zip(dims, block)}, **fixed,
             num_warps=warps, num_stages=stages)
        for block, launches in blocks.items() for warps, stages in launches
    ]  # fmt: skip


def variants(table: str, tile: Tile) -> list[Tile]:
    """The variants of a compiled tile that are timed."""
    return [replace(tile, programs=n) for n in PROGRAMS] if table in SPLIT else [tile]


def table_of(case: KernelCase) -> str | None:
    """The name of the table a case reads, or None."""
    if case.kernel.startswith("widened"):
        return "widened_ffn"
    if case.kernel == "tail_gemm":
        if "descriptors" in case.name:
            return "tail_gemm_descriptor"
        return "tail_gemm_masked" if "p=" in case.name else "tail_gemm"
    if case.kernel == "prefix" and int(case.name.split("P=")[1]) <= config.SHORT:
        return "prefix_short"
    if case.kernel == "prefix_bwd" and "p=" in case.name:
        return "prefix_bwd_dropped"
    return case.kernel if case.kernel in TABLES else None


def cases_of(table: str, device: torch.device, sizes: Sizes, dtype) -> Iterator[KernelCase]:
    """The cases that read a table, one at a time."""
    for case in cases(device, sizes, dtype, (FAMILY[table],)):
        if table_of(case) == table:
            yield case


def size_of(case: KernelCase, sizes: Sizes) -> int:
    """The size that the table is looked up by: the rank, or the head dim."""
    if case.kernel.startswith("prefix"):
        return sizes.dim
    return int(case.name.split("R=")[1].split()[0]) if "R=" in case.name else 512


def limit_of(table: str, size: int, device: torch.device) -> int:
    """The largest size that the present row serves."""
    rows = [r for a in (config.architecture(device), "any") for r in config.rows(table, a)]
    return next((r.limit for r in rows if r.bits == HALF and size <= r.limit), size)


def name_of(case: KernelCase, tile: Tile | None) -> str:
    """The name of a case under a tile in the report of the compilations; None: the present row."""
    return f"{case.kernel} {case.name} {tile or 'present row'}"
