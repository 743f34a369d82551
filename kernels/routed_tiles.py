"""Tiles of the kernels of many methods in one batch; ``tiles`` says how rows are taken."""

from pelt_fast.kernels.tile import HALF, MAX_RANK, SINGLE, Row, Tile

# fmt: off
ROUTED: dict[str, dict[str, tuple[Row, ...]]] = {
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
        "gfx942": (
            Row(HALF, MAX_RANK, Tile(64, 64, block_r=32, num_warps=4, num_stages=3),
                "half as wide as elsewhere, no spills; unmeasured"),
        ),
        "any": (
            Row(HALF, MAX_RANK, Tile(64, 128, block_r=32, num_warps=8, num_stages=3),
                "rows are found first: three stages are two deep; fewer parts of dT; unmeasured"),
            Row(SINGLE, MAX_RANK, Tile(16, 32, block_r=32, num_warps=4, num_stages=2),
                "as rank_up_bwd; unmeasured"),
        ),
    },
}
# fmt: on
