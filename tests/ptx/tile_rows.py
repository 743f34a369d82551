"""The rows of kernels/tiles.py that the machine counts, and the tiles that are counted beside each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

from pelt_fast.kernels.tile import HALF, Row, Tile
from pelt_fast.kernels.tiles import TABLES

TARGETS = ("sm80", "sm90")
MOST = 7  # tiles beside the row's own
UNKNOWN = {("tail_gemm_descriptor", "sm80")}  # no bulk tensor copies there
# the rank or head dim that a row is counted at, if it serves it; the case, by a part of its name
RANKS = {"adapter": 64, "norm": 64, "rank_down_norm": 64, "rank_down_bwd_norm": 64, "prefix": 64,
         "prefix_bwd": 64, "widened_ffn": 512}  # fmt: skip
CASES = {"rank_down": "p=0.1", "rank_down_bwd": "p=0.1", "rank_up": "p=0.1", "adapter": " norm",
         "prefix": "P=30", "prefix_bwd": "P=30", "widened_ffn": "widened_act gated p=0.1",
         "tail_gemm_descriptor": "p=0.1"}  # fmt: skip
# sizes that benchmarks.gpu.candidates are made for
TUNED = (16, 64)


@dataclass(frozen=True)
class Place:
    """A row as one target reaches it: ``arch`` is where the row stands, ``low`` the limit of the
    row before it."""

    table: str
    target: str
    arch: str
    low: int
    row: Row

    @property
    def key(self) -> list:
        """What the row is found by in the file."""
        return [self.table, self.target, self.row.bits, self.row.limit]

    @property
    def size(self) -> int:
        """The rank, or the head dim, that it is counted at."""
        usual = RANKS.get(self.table, 16)
        if not self.low < usual <= self.row.limit:
            return min(self.row.limit, 512)
        return usual


def places() -> Iterator[Place]:
    """All rows, as ``config.pick`` reaches them where nothing was measured."""
    for table, archs in TABLES.items():
        for target in TARGETS:
            low: dict[int, int] = {}
            for arch in (target, "any") if (table, target) not in UNKNOWN else ():
                for row in archs.get(arch, ()):
                    if row.limit > low.get(row.bits, 0):
                        yield Place(table, target, arch, low.get(row.bits, 0), row)
                        low[row.bits] = row.limit


def tiles(place: Place) -> list[Tile]:
    """The row's own tile, then others: those that tuning tries, each block and number of warps once,
    since the counts are the same for all depths of the pipeline. It tries them for bf16 and ranks
    and head dims up to 64: for others those near the row's own come first, for fp32 alone."""
    own, half = place.row.tile, place.row.bits == HALF
    found = (
        []
        if half and (place.size in TUNED or place.table == "widened_ffn")
        else list(near(own, place))
    )
    if half:
        from benchmarks.gpu.candidates import candidates

        kept = dict(block_r=own.block_r, programs=own.programs)
        found += by_turns([replace(tile, **kept) for tile in candidates(place.table)])
    return [own, *[tile for tile in dict.fromkeys(found) if tile != own][:MOST]]


def by_turns(tiles: list[Tile]) -> list[Tile]:
    """Of each shape of block the tile with the first number of warps, then those with the second."""
    each: dict[tuple, dict[int, Tile]] = {}
    for tile in tiles:
        blocks = (tile.block_m, tile.block_n, tile.block_k)
        each.setdefault(blocks, {}).setdefault(tile.num_warps, tile)
    turns = zip_longest(*[found.values() for found in each.values()])
    return [tile for turn in turns for tile in turn if tile is not None]


def near(own: Tile, place: Place) -> Iterator[Tile]:
    """Each block twice as large, or half, but no product below 16 a side."""
    least = 1 if place.table == "widened_ffn" else 16
    for name in ("block_m", "block_n", "block_k"):
        size = getattr(own, name)
        for other in (2 * size, size // 2):
            if size and other >= least:
                yield replace(own, **{name: other})
