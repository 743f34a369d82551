"""Tiles of every kernel: kernel x architecture x class, frozen data, each row with its reason.

``config.pick`` takes the row of the device's own architecture, else that of "any", which fits the
shared memory of every GPU named here (64 KiB on gfx942). Rows marked *unmeasured* are estimates
from bytes in flight and registers. Rows marked *counted* were executed on a CPU by ``python -m
tests.ptx.tiles`` (docs/codegen.md), which writes there: the clocks of their work at the peaks of a
GPU over those of the least bytes and flops, the resource that needs them, and the share of them in
which instructions issue. ``make gpu PART=tune`` measures candidates and writes the fastest rows to
``tuned.py``, which is read first. Products in fp32 are exact: they run on the FMA units.
"""

from pelt_fast.kernels.routed_tiles import ROUTED
from pelt_fast.kernels.tile import HALF, MAX_RANK, SINGLE, Row, Tile

MAX_PREFIX = 1024
MAX_HEAD_DIM = 256

# fmt: off
TABLES: dict[str, dict[str, tuple[Row, ...]]] = {
    **ROUTED,
    "rank_down": {
        "sm80": (
            Row(HALF, 32, Tile(128, block_k=64, block_r=32, num_warps=8, num_stages=4),
                "128 rows; 48 KiB of x in flight; counted: sm80 1.06 by dram, issue 91 %"),
            Row(HALF, 128, Tile(128, block_k=64, block_r=128, num_warps=8, num_stages=2),
                "128 rows share what they read of a; counted: sm80 1.99 by shared, issue 55 %"),
            Row(SINGLE, 32, Tile(16, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "fp32: many programs; counted: sm80 9.12 by shared, issue 16 %"),
        ),
        "sm90": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=4),
                "48 KiB of x in flight a program, two programs an SM; counted: "
                "sm90 1.38 by issue, issue 100 %"),
            Row(SINGLE, 32, Tile(64, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "fp32: 64 rows share the operands; counted: sm90 9.25 by shared, issue 23 %"),
            Row(SINGLE, MAX_RANK, Tile(64, block_k=32, block_r=64, num_warps=4, num_stages=2),
                "fp32: square tiles share operands; counted: sm90 8.91 by shared, issue 20 %"),
        ),
        "any": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=2),
                "fits 64 KiB; unmeasured"),
            Row(HALF, 128, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=2),
                "one read of x up to R = 128; counted: sm90 2.77 by shared, issue 56 %"),
            Row(HALF, MAX_RANK, Tile(128, block_k=32, block_r=128, num_warps=8, num_stages=2),
                "a GEMM: square tiles, 32 deep or sm_80 spills; counted: "
                "sm80 2.39 by shared, issue 62 %; sm90 4.15 by l2, issue 49 %"),
            Row(SINGLE, 32, Tile(32, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=64, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: sm80 7.87 by shared, issue 12 %"),
        ),
    },
    "rank_down_bwd": {
        "sm80": (
            Row(SINGLE, MAX_RANK, Tile(32, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "64 rows a dot: no tf32 before sm_100; counted: sm80 1.67 by shared, issue 48 %"),
        ),
        "sm90": (
            Row(HALF, 32, Tile(64, block_k=128, block_r=32, num_warps=4, num_stages=4),
                "as rank_down: the same stream of x; counted: sm90 1.06 by dram, issue 65 %"),
        ),
        "any": (
            Row(HALF, 128, Tile(64, block_k=128, block_r=64, num_warps=4, num_stages=2),
                "fits 64 KiB; counted: "
                "sm80 1.04 by dram, issue 37 %; sm90 1.79 by shared, issue 74 %"),
            Row(HALF, MAX_RANK, Tile(64, block_k=128, block_r=128, num_warps=8, num_stages=2),
                "a GEMM: square tiles; counted: "
                "sm80 3.51 by shared, issue 30 %; sm90 2.04 by shared, issue 67 %"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "below 64 rows a dot: from there sm_100 takes tf32 (docs/facts.md); counted: "
                "sm90 3.07 by shared, issue 43 %"),
        ),
    },
    "rank_down_norm": {  # a LayerNorm before: mean, deviation, weight and bias beside the tile
        "sm80": (
            Row(HALF, 64, Tile(128, block_k=64, block_r=64, num_warps=8, num_stages=3),
                "128 rows share the weights; counted: sm80 1.34 by shared, issue 82 %"),
        ),
        "sm90": (
            Row(HALF, 64, Tile(128, block_k=64, block_r=64, num_warps=8, num_stages=3),
                "128 rows share the weights; counted: sm90 1.40 by shared, issue 65 %"),
            Row(SINGLE, MAX_RANK, Tile(64, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "fp32: 64 rows share the operands; counted: sm90 11.36 by shared, issue 14 %"),
        ),
        "any": (
            Row(HALF, 128, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=2),
                "as rank_down; counted: "
                "sm80 3.54 by shared, issue 77 %; sm90 3.10 by shared, issue 51 %"),
            Row(HALF, MAX_RANK, Tile(128, block_k=32, block_r=128, num_warps=8, num_stages=2),
                "as rank_down; counted: "
                "sm80 2.40 by shared, issue 93 %; sm90 4.21 by l2, issue 32 %"),
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: sm80 7.85 by shared, issue 12 %"),
        ),
    },
    "rank_down_bwd_norm": {
        "sm80": (
            Row(SINGLE, MAX_RANK, Tile(16, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "64 rows a dot: no tf32 before sm_100; counted: sm80 1.48 by shared, issue 54 %"),
        ),
        "sm90": (  # one stage: with more, Triton overwrites operands of wgmma in flight (facts.md)
            Row(HALF, 128, Tile(64, block_k=128, block_r=64, num_warps=4, num_stages=1),
                "as rank_down_bwd; counted: sm90 1.41 by l2, issue 64 %"),
            Row(HALF, MAX_RANK, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=1),
                "as elsewhere; counted: sm90 3.48 by l2, issue 75 %"),
            Row(SINGLE, MAX_RANK, Tile(16, block_k=64, block_r=32, num_warps=4, num_stages=2),
                "64 rows a dot: no tf32 before sm_100; counted: sm90 2.74 by shared, issue 54 %"),
        ),
        "gfx942": (
            Row(SINGLE, MAX_RANK, Tile(32, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "16 bytes a lane of 256; unmeasured"),
        ),
        "any": (
            Row(HALF, 128, Tile(64, block_k=128, block_r=64, num_warps=4, num_stages=2),
                "as rank_down_bwd; counted: sm80 1.16 by dram, issue 44 %"),
            Row(HALF, MAX_RANK, Tile(64, block_k=64, block_r=128, num_warps=8, num_stages=2),
                "half of rank_down_bwd's tile, or gfx942 spills; counted: "
                "sm80 2.02 by shared, issue 50 %"),
            Row(SINGLE, MAX_RANK, Tile(16, block_k=32, block_r=32, num_warps=4, num_stages=2),
                "half of rank_down_bwd's tile, no spills; unmeasured"),
        ),
    },
    "rank_up": {
        "any": (
            Row(HALF, 64, Tile(64, 128, block_r=64, num_warps=4, num_stages=2),
                "16 KiB of y a program, 64 accumulators a thread; counted: "
                "sm80 1.00 by dram, issue 63 %; sm90 1.00 by dram, issue 99 %"),
            Row(HALF, MAX_RANK, Tile(128, 128, block_r=64, num_warps=8, num_stages=2),
                "a GEMM: square tiles; counted: "
                "sm80 1.55 by shared, issue 54 %; sm90 2.89 by l2, issue 49 %"),
            Row(SINGLE, MAX_RANK, Tile(32, 32, block_r=16, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: "
                "sm80 2.13 by shared, issue 45 %; sm90 3.20 by shared, issue 45 %"),
        ),
    },
    "prefix": {  # the class is the padded head dim
        "sm90": (
            Row(HALF, 64, Tile(64, 64, num_warps=4, num_stages=1),
                "one warpgroup has 64 queries; counted: sm90 1.02 by dram, issue 87 %"),
            Row(HALF, 256, Tile(64, 32, num_warps=8, num_stages=1),
                "64 queries for wgmma; counted: sm90 1.01 by dram, issue 81 %"),
        ),
        "gfx942": (
            Row(HALF, 128, Tile(32, 32, num_warps=4, num_stages=1),
                "a wave is 64 lanes: four hold what eight warps do; unmeasured"),
        ),
        "any": (
            Row(HALF, 64, Tile(64, 64, num_warps=8, num_stages=1),
                "a tile of scores and one of values in registers; counted: "
                "sm80 1.24 by shared, issue 98 %"),
            Row(HALF, 128, Tile(64, 32, num_warps=8, num_stages=1),
                "as for 64, half the keys; counted: sm80 1.07 by issue, issue 100 %"),
            Row(HALF, 256, Tile(16, 32, num_warps=8, num_stages=1),
                "256 columns a row: small tiles, no spills; counted: "
                "sm80 1.37 by shared, issue 87 %"),
            Row(SINGLE, 256, Tile(16, 16, num_warps=4, num_stages=1),
                "fp32: small tiles, no spills; counted: "
                "sm80 6.34 by shared, issue 24 %; sm90 9.90 by shared, issue 24 %"),
        ),
    },
    "prefix_bwd": {  # the class is the padded head dim
        "sm80": (
            Row(HALF, 128, Tile(32, 32, num_warps=8, num_stages=1),
                "as elsewhere; counted: sm80 1.00 by shared, issue 43 %"),
            Row(HALF, 256, Tile(16, 32, num_warps=8, num_stages=1),
                "a prefix of 32 in one block; counted: sm80 0.88 by dram, issue 35 %"),
            Row(SINGLE, 256, Tile(16, 32, num_warps=4, num_stages=1),
                "fp32: a prefix of 32 in one block; counted: sm80 5.87 by shared, issue 16 %"),
        ),
        "sm90": (
            Row(HALF, 64, Tile(64, 64, num_warps=8, num_stages=1),
                "64 queries a step for wgmma; counted: sm90 0.88 by dram, issue 46 %"),
        ),
        "gfx942": (
            Row(HALF, 128, Tile(32, 32, num_warps=4, num_stages=1),
                "a wave is 64 lanes: four hold what eight warps do; unmeasured"),
        ),
        "any": (
            Row(HALF, 128, Tile(32, 32, num_warps=8, num_stages=1),
                "q, do, o, dq and two accumulators in registers, no spills; counted: "
                "sm90 1.01 by shared, issue 40 %"),
            Row(HALF, 256, Tile(16, 16, num_warps=8, num_stages=1),
                "256 columns a row: small tiles, no spills; counted: "
                "sm90 4.12 by shared, issue 32 %"),
            Row(SINGLE, 256, Tile(16, 16, num_warps=4, num_stages=1),
                "fp32: small tiles, no spills; counted: sm90 19.12 by shared, issue 14 %"),
        ),
    },
    "adapter": {
        "any": (
            Row(HALF, 64, Tile(32, 128, 128, num_warps=4, num_stages=2),
                "many blocks of rows, x and base streamed; fits 64 KiB; counted: "
                "sm80 1.41 by shared, issue 56 %"),
            Row(HALF, 128, Tile(32, 64, 64, num_warps=4, num_stages=2),
                "as above, half as wide; counted: sm80 2.43 by shared, issue 45 %"),
            Row(SINGLE, 128, Tile(16, 64, 32, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: "
                "sm80 8.00 by shared, issue 11 %; sm90 15.65 by shared, issue 11 %"),
        ),
        "sm90": (
            Row(HALF, 64, Tile(64, 128, 128, num_warps=4, num_stages=3),
                "64 rows for wgmma, 48 KiB of x in flight; counted: sm90 1.38 by l2, issue 53 %"),
            Row(HALF, 128, Tile(64, 128, 64, num_warps=8, num_stages=3),
                "64 rows for wgmma; counted: sm90 2.09 by shared, issue 52 %"),
        ),
    },
    "norm": {
        "any": (
            Row(HALF, MAX_RANK, Tile(32, block_k=128, block_r=64, num_warps=4, num_stages=2),
                "many blocks of rows; 32 KiB of x and dy in flight; counted: "
                "sm80 1.33 by shared, issue 64 %"),
            Row(SINGLE, MAX_RANK, Tile(16, block_k=128, block_r=32, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: "
                "sm80 1.43 by shared, issue 61 %; sm90 2.79 by shared, issue 61 %"),
        ),
        "sm90": (
            Row(HALF, MAX_RANK, Tile(64, block_k=128, block_r=64, num_warps=8, num_stages=2),
                "64 rows for wgmma; counted: sm90 1.79 by l2, issue 50 %"),
        ),
    },
    "tail_gemm": {
        "any": (
            Row(HALF, MAX_RANK, Tile(128, 128, 32, 32, num_warps=8, num_stages=2),
                "fits 64 KiB; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, 64, 16, 16, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: sm90 16.20 by shared, issue 10 %"),
        ),
        "sm80": (
            Row(HALF, MAX_RANK, Tile(128, 128, 32, 32, num_warps=8, num_stages=4),
                "64 KiB in flight; counted: sm80 1.02 by shared, issue 37 %"),
            Row(SINGLE, MAX_RANK, Tile(64, 64, 16, 16, num_warps=4, num_stages=2),
                "fp32: square tiles, no spills; counted: sm80 4.39 by shared, issue 16 %"),
        ),
        "sm90": (
            Row(HALF, MAX_RANK, Tile(128, 256, 64, 32, num_warps=8, num_stages=3),
                "wgmma's largest tile, 144 KiB in flight; counted: sm90 1.27 by l2, issue 23 %"),
        ),
        "sm100": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 32, num_warps=8, num_stages=3),
                "96 KiB in flight; unmeasured"),
        ),
    },
    "tail_gemm_masked": {  # the tail has its own accumulator
        "sm80": (
            Row(HALF, MAX_RANK, Tile(128, 128, 32, 32, num_warps=8, num_stages=4),
                "as tail_gemm: square tiles, 64 KiB in flight; counted: "
                "sm80 1.02 by shared, issue 42 %"),
        ),
        "any": (
            Row(HALF, MAX_RANK, Tile(128, 64, 32, 32, num_warps=8, num_stages=2),
                "fits 64 KiB, no spills; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(32, 128, 16, 16, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: "
                "sm80 1.00 by fp32, issue 66 %; sm90 1.72 by shared, issue 79 %"),
        ),
        "sm90": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 32, num_warps=8, num_stages=3),
                "two accumulators of 64 registers a thread; counted: sm90 1.69 by l2, issue 32 %"),
        ),
    },
    "tail_gemm_descriptor": {
        "sm100": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 64, num_warps=8, num_stages=3),
                "the tail of R = 64 in one step, no spills; unmeasured"),
        ),
        "any": (
            Row(HALF, MAX_RANK, Tile(128, 128, 64, 32, num_warps=8, num_stages=3),
                "96 KiB in flight beside the tile stored; counted: sm90 1.74 by l2, issue 20 %"),
            Row(SINGLE, MAX_RANK, Tile(32, 64, 32, 16, num_warps=4, num_stages=2),
                "fp32: small tiles, no spills; counted: sm90 2.27 by shared, issue 57 %"),
        ),
    },
    "widened_ffn": {
        "any": (
            Row(HALF, MAX_RANK, Tile(4, 512, num_warps=4),
                "16 elements a thread; counted: "
                "sm80 1.00 by dram, issue 54 %; sm90 1.00 by dram, issue 80 %"),
            Row(SINGLE, MAX_RANK, Tile(4, 256, num_warps=4),
                "8 elements a thread; counted: "
                "sm80 1.00 by dram, issue 44 %; sm90 1.00 by dram, issue 66 %"),
        ),
    },
    "rank_up_bwd": {
        # wide in n: the workspace of dt, 8 M R N / BLOCK_N bytes, shrinks with BLOCK_N
        "sm80": (
            Row(HALF, 16, Tile(64, 256, num_warps=8, num_stages=2),
                "workspace 1/4 of dy at R = 16; counted: sm80 2.87 by shared, issue 21 %"),
            Row(HALF, 64, Tile(32, 64, num_warps=4, num_stages=2),
                "no spills with the mask and gelu in the loop; counted: "
                "sm80 6.72 by shared, issue 24 %"),
        ),
        "sm90": (
            Row(HALF, 16, Tile(64, 256, num_warps=4, num_stages=3),
                "workspace 1/4 of dy at R = 16, 96 KiB of dy in flight; counted: "
                "sm90 2.39 by shared, issue 29 %"),
            Row(HALF, 64, Tile(128, 128, num_warps=8, num_stages=2),
                "no spills with the mask and gelu in the loop; counted: "
                "sm90 3.85 by shared, issue 29 %"),
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
                "fp32: small tiles, no spills; counted: "
                "sm80 4.08 by shared, issue 35 %; sm90 7.32 by shared, issue 36 %"),
        ),
    },
}
# fmt: on
