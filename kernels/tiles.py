"""Tiles of every kernel: kernel x architecture x class, frozen data, each row with its reason.

``config.pick`` takes the row of the device's own architecture, else that of "any", which fits the
shared memory of every GPU named here (64 KiB on gfx942). Rows marked *unmeasured* are estimates
from bytes in flight and registers. ``make gpu PART=tune`` measures candidates and writes the
fastest rows to ``tuned.py``, which is read first.
"""

from dataclasses import dataclass

MAX_RANK = 1024
MAX_PREFIX = 1024
MAX_HEAD_DIM = 256
HALF, SINGLE = 16, 32  # bits of an element


@dataclass(frozen=True)
class Tile:
    """Blocks of one program, its warps and its pipeline depth; 0 if a kernel has no such dim.

    ``programs`` is the number a processor that ``config.split`` aims at, if a kernel splits its
    loop.
    """

    block_m: int
    block_n: int = 0
    block_k: int = 0
    block_r: int = 0
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 2

    @property
    def launch(self) -> dict[str, int]:
        """The options Triton's launcher takes."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages)


@dataclass(frozen=True)
class Row:
    """One row: the tile for elements of ``bits`` and sizes up to ``limit``, and why."""

    bits: int
    limit: int
    tile: Tile
    why: str


# fmt: off
TABLES: dict[str, dict[str, tuple[Row, ...]]] = {
    "rank_down": {
        "sm90": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=4),
                "48 KiB of x in flight a program, two programs an SM; unmeasured"),
        ),
        "any": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=2),
                "fits 64 KiB; unmeasured"),
            Row(HALF, 128, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=2),
                "one read of x up to R = 128; unmeasured"),
            Row(HALF, MAX_RANK, Tile(128, block_k=32, block_r=128, num_warps=8, num_stages=2),
                "a GEMM: square tiles, 32 deep or sm_80 spills; unmeasured"),
            Row(SINGLE, 32, Tile(32, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=64, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "rank_down_bwd": {
        "sm90": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=4),
                "as rank_down: the same stream of x; unmeasured"),
        ),
        "any": (
            Row(HALF, 128, Tile(64, block_k=128, block_r=64, num_warps=4, num_stages=2),
                "fits 64 KiB; unmeasured"),
            Row(HALF, MAX_RANK, Tile(64, block_k=128, block_r=128, num_warps=8, num_stages=2),
                "a GEMM: square tiles; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "below 64 rows a dot: from there sm_100 takes tf32 (docs/facts.md); unmeasured"),
        ),
    },
    "rank_down_norm": {  # a LayerNorm before: mean, deviation, weight and bias beside the tile
        "any": (
            Row(HALF, 128, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=2),
                "as rank_down; unmeasured"),
            Row(HALF, MAX_RANK, Tile(128, block_k=32, block_r=128, num_warps=8, num_stages=2),
                "as rank_down; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "rank_down_bwd_norm": {
        "sm90": (  # one stage: with more, Triton overwrites operands of wgmma in flight (facts.md)
            Row(HALF, 128, Tile(64, block_k=128, block_r=64, num_warps=4, num_stages=1),
                "as rank_down_bwd; unmeasured"),
            Row(HALF, MAX_RANK, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=1),
                "as elsewhere; unmeasured"),
        ),
        "gfx942": (
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "16 bytes a lane of 256; unmeasured"),
        ),
        "any": (
            Row(HALF, 128, Tile(64, block_k=128, block_r=64, num_warps=4, num_stages=2),
                "as rank_down_bwd; unmeasured"),
            Row(HALF, MAX_RANK, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=2),
                "half of rank_down_bwd's tile, or gfx942 spills; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(16, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "half of rank_down_bwd's tile, no spills; unmeasured"),
        ),
    },
    "rank_up": {
        "any": (
            Row(HALF, 64, Tile(64, 128, block_r=64, num_warps=4, num_stages=2),
                "16 KiB of y a program, 64 accumulators a thread; unmeasured"),
            Row(HALF, MAX_RANK, Tile(128, 128, block_r=64, num_warps=8, num_stages=2),
                "a GEMM: square tiles; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, 64, block_r=16, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "routed_down": {  # the class is the largest rank of the batch; rows are gathered
        "sm100": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=2),
                "as elsewhere; unmeasured"),
            Row(HALF, MAX_RANK, Tile(64, block_k=64, block_r=64, num_warps=8, num_stages=2),
                "as elsewhere, no spills; unmeasured"),
        ),
        "any": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=2),
                "as rank_down; unmeasured"),
            Row(HALF, MAX_RANK, Tile(64, block_k=64, block_r=64, num_warps=4, num_stages=2),
                "as rank_down, narrow blocks of ranks: small methods skip the others; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "routed_down_bwd": {
        "any": (
            Row(HALF, MAX_RANK, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=3),
                "rows are found first: three stages are two deep; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "as rank_down_bwd; unmeasured"),
        ),
    },
    "routed_up": {
        "sm80": (
            Row(HALF, MAX_RANK, Tile(64, 64, block_r=32, num_warps=4, num_stages=1),
                "half as wide, no spills; unmeasured"),
        ),
        "any": (
            Row(HALF, MAX_RANK, Tile(64, 128, block_r=32, num_warps=8, num_stages=1),
                "a loop over few ranks: no pipeline; rows and mask in registers; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, 64, block_r=16, num_warps=4, num_stages=1),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "routed_up_bwd": {
        "any": (
            Row(HALF, MAX_RANK, Tile(64, 64, block_r=32, num_warps=4, num_stages=3),
                "rows are found first: three stages are two deep; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(16, 32, block_r=32, num_warps=4, num_stages=2),
                "as rank_up_bwd; unmeasured"),
        ),
    },
    "prefix": {  # the class is the padded head dim
        "gfx942": (
            Row(HALF, 128, Tile(32, 32, num_warps=4, num_stages=1),
                "a wave is 64 lanes: four hold what eight warps do; unmeasured"),
        ),
        "any": (
            Row(HALF, 64, Tile(64, 64, num_warps=8, num_stages=1),
                "a tile of scores and one of values in registers; unmeasured"),
            Row(HALF, 128, Tile(64, 32, num_warps=8, num_stages=1),
                "as for 64, half the keys; unmeasured"),
            Row(HALF, 256, Tile(16, 16, num_warps=8, num_stages=1),
                "256 columns a row: small tiles, no spills; unmeasured"),
            Row(SINGLE, 256, Tile(16, 16, num_warps=4, num_stages=1),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "prefix_bwd": {  # the class is the padded head dim
        "sm90": (
            Row(HALF, 64, Tile(64, 64, num_warps=8, num_stages=1),
                "64 queries a step for wgmma; unmeasured"),
        ),
        "gfx942": (
            Row(HALF, 128, Tile(32, 32, num_warps=4, num_stages=1),
                "a wave is 64 lanes: four hold what eight warps do; unmeasured"),
        ),
        "any": (
            Row(HALF, 128, Tile(32, 32, num_warps=8, num_stages=1),
                "q, do, o, dq and two accumulators in registers, no spills; unmeasured"),
            Row(HALF, 256, Tile(16, 16, num_warps=8, num_stages=1),
                "256 columns a row: small tiles, no spills; unmeasured"),
            Row(SINGLE, 256, Tile(16, 16, num_warps=4, num_stages=1),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "adapter": {
        "any": (
            Row(HALF, 64, Tile(32, 128, 128, num_warps=4, num_stages=2),
                "many blocks of rows, x and base streamed; fits 64 KiB; unmeasured"),
            Row(HALF, 128, Tile(32, 64, 64, num_warps=4, num_stages=2),
                "as above, half as wide; unmeasured"),
            Row(SINGLE, 128, Tile(16, 32, 32, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
        "sm90": (
            Row(HALF, 64, Tile(64, 128, 128, num_warps=4, num_stages=3),
                "64 rows for wgmma, 48 KiB of x in flight; unmeasured"),
            Row(HALF, 128, Tile(64, 128, 64, num_warps=8, num_stages=3),
                "64 rows for wgmma; unmeasured"),
        ),
    },
    "norm": {
        "any": (
            Row(HALF, MAX_RANK, Tile(32, block_k=128, block_r=64, num_warps=4, num_stages=2),
                "many blocks of rows; 32 KiB of x and dy in flight; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(16, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
        "sm90": (
            Row(HALF, MAX_RANK, Tile(64, block_k=128, block_r=64, num_warps=8, num_stages=2),
                "64 rows for wgmma; unmeasured"),
        ),
    },
    "tail_gemm": {
        "any": (
            Row(HALF, MAX_RANK, Tile(128, 128, 32, 32, num_warps=8, num_stages=2),
                "fits 64 KiB; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, 64, 16, 16, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
        "sm80": (
            Row(HALF, MAX_RANK, Tile(128, 128, 32, 32, num_warps=8, num_stages=4),
                "64 KiB in flight; unmeasured"),
        ),
        "sm90": (
            Row(HALF, MAX_RANK, Tile(128, 256, 64, 32, num_warps=8, num_stages=3),
                "wgmma's largest tile, 144 KiB in flight; unmeasured"),
        ),
        "sm100": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 32, num_warps=8, num_stages=3),
                "96 KiB in flight; unmeasured"),
        ),
    },
    "tail_gemm_masked": {  # the tail has its own accumulator
        "any": (
            Row(HALF, MAX_RANK, Tile(128, 64, 32, 32, num_warps=8, num_stages=2),
                "fits 64 KiB, no spills; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, 64, 16, 16, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
        "sm90": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 32, num_warps=8, num_stages=3),
                "two accumulators of 64 registers a thread; unmeasured"),
        ),
    },
    "tail_gemm_descriptor": {
        "sm100": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 64, num_warps=8, num_stages=3),
                "the tail of R = 64 in one step, no spills; unmeasured"),
        ),
        "any": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 32, num_warps=8, num_stages=3),
                "96 KiB in flight beside the tile stored; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, 64, 32, 16, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
    "widened_ffn": {
        "any": (
            Row(HALF, MAX_RANK, Tile(4, 512, num_warps=4), "16 elements a thread; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(4, 256, num_warps=4), "8 elements a thread; unmeasured"),
        ),
    },
    "rank_up_bwd": {
        # wide in n: the workspace of dt, 8 M R N / BLOCK_N bytes, shrinks with BLOCK_N
        "sm80": (
            Row(HALF, 16, Tile(64, 256, num_warps=8, num_stages=2),
                "workspace 1/4 of dy at R = 16; unmeasured"),
            Row(HALF, 64, Tile(32, 64, num_warps=4, num_stages=2),
                "no spills with the mask and gelu in the loop; unmeasured"),
        ),
        "sm90": (
            Row(HALF, 16, Tile(64, 256, num_warps=8, num_stages=3),
                "workspace 1/4 of dy at R = 16, 96 KiB of dy in flight; unmeasured"),
            Row(HALF, 64, Tile(64, 128, num_warps=8, num_stages=2),
                "no spills with the mask and gelu in the loop; unmeasured"),
        ),
        "sm100": (
            Row(HALF, 16, Tile(64, 256, num_warps=8, num_stages=2),
                "as sm90; unmeasured"),
            Row(HALF, 64, Tile(64, 128, num_warps=8, num_stages=2),
                "as sm90; unmeasured"),
        ),
        "any": (
            Row(HALF, 64, Tile(64, 64, num_warps=4, num_stages=2), "fits 64 KiB; unmeasured"),
            Row(SINGLE, 64, Tile(16, 32, num_warps=4, num_stages=2),
                "exact fp32 runs on the FMA units: small tiles, no spills; unmeasured"),
        ),
    },
}
# fmt: on
