"""A tile of a kernel, and a row of the tables of tiles (``tiles``, ``tuned``)."""

from dataclasses import dataclass

MAX_RANK = 1024
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
