"""What the counts of tiles say: orders, the table in docs/codegen.md, the reasons of kernels/tiles.py."""

import ast
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pelt_fast.kernels.tile import Tile

from .emulate import table
from .pages import put
from .peaks import PEAKS, Estimate, estimate, floor
from .sampled import Work
from .tile_rows import Place, places

FILE = Path(__file__).parent / "counted_tiles.json"
TILES = Path(__file__).parents[2] / "kernels" / "tiles.py"
MARK = "; counted: "
WIDTH = 80  # of the words on a line of kernels/tiles.py
CLEAR = 0.8  # of the row's own clocks: what another tile must come to


@dataclass
class Counted:
    """The counts of a row: the case, the bytes and flops that its file promises, and of each tile
    the works or why it is left out."""

    key: list
    case: str
    bytes: float
    flops: float
    entries: list[dict]

    def entry(self, tile: Tile) -> dict | None:
        """What is known of a tile."""
        return next((e for e in self.entries if Tile(**e["tile"]) == tile), None)

    def estimate(self, entry: dict) -> Estimate:
        """Of a tile that was counted."""
        return estimate([Work(*each) for each in entry["works"]], PEAKS[self.key[1]])

    @property
    def floor(self) -> float:
        """The clocks of the promise."""
        return floor(self.bytes, self.flops, self.key[2], PEAKS[self.key[1]])

    def ordered(self) -> list[tuple[Tile, Estimate]]:
        """The tiles that were counted: fewest clocks first, of equal ones the one with less to do
        in all, then the one with more programs at a time."""
        each = [(Tile(**e["tile"]), self.estimate(e)) for e in self.entries if "works" in e]
        return sorted(each, key=lambda t: (round(t[1].clocks), round(t[1].all), -t[1].resident))


def read() -> dict[tuple, Counted]:
    """The file, by key."""
    if not FILE.exists():
        return {}
    return {tuple(row["key"]): Counted(**row) for row in json.loads(FILE.read_text())}


def write(found: dict[tuple, Counted]) -> None:
    """The file: a line for each tile."""
    rows = []
    for counted in found.values():
        head = json.dumps({n: v for n, v in asdict(counted).items() if n != "entries"})
        lines = ",\n  ".join(json.dumps(entry) for entry in counted.entries)
        rows.append(f'{head[:-1]}, "entries": [\n  {lines}]}}')
    FILE.write_text("[" + ",\n".join(rows) + "]\n")


def named(tile: Tile) -> str:
    """Blocks x warps, stages."""
    blocks = [getattr(tile, f"block_{d}") for d in "mnkr"]
    said = ", ".join(f"{d} {size}" for d, size in zip("mnkr", blocks) if size)
    return f"{said}; {tile.num_warps} warps, {tile.num_stages} stages"


def order(place: Place, counted: Counted) -> str:
    """All tiles of a row, in order."""
    lines = [f"{' '.join(map(str, place.key))}: {counted.case}"]
    for tile, found in counted.ordered():
        mark = "*" if tile == place.row.tile else " "
        lines.append(
            f" {mark} {named(tile):<44}{found.clocks:>10,.0f} {found.clocks / counted.floor:5.2f}"
            f" {found.bound:<8}issue {found.issue:4.0%} all {found.all:>10,.0f}"
            f" programs {found.resident} waves {found.waves:.2f}"
        )
    left = [e for e in counted.entries if "left_out" in e]
    return "\n".join(lines + [f"   {named(Tile(**e['tile'])):<44}{e['left_out']}" for e in left])


def words(place: Place, counted: Counted) -> str | None:
    """What a row says of one target; None where its tile was not counted."""
    entry = counted.entry(place.row.tile)
    if entry is None or "works" not in entry:
        return None
    found = counted.estimate(entry)
    return (
        f"{place.target} {found.clocks / counted.floor:.2f} by {found.bound},"
        f" issue {100 * found.issue:.0f} %"
    )


def reasons(found: dict[tuple, Counted]) -> dict[tuple, list[str]]:
    """(table, arch, bits, limit) -> the words of each target."""
    said: dict[tuple, list[str]] = {}
    for place in places():
        counted = found.get(tuple(place.key))
        text = words(place, counted) if counted else None
        if text:
            key = (place.table, place.arch, place.row.bits, place.row.limit)
            said.setdefault(key, []).append(text)
    return said


HEAD = ("table", "target", "bits", "up to", "case", "tile", "clocks", "to the floor", "by", "issue",
        "programs", "waves", "least of the others", "others, left out")  # fmt: skip


def line(place: Place, counted: Counted) -> tuple | None:
    """The line of a row on the page."""
    each = dict(counted.ordered())
    own = each.pop(place.row.tile, None)
    if own is None:
        return None
    best = next(iter(each), None)
    least = f"{named(best)}: {each[best].clocks / own.clocks:.2f} of it" if best else "-"
    return (
        place.table, place.target, place.row.bits, place.row.limit, counted.case,
        named(place.row.tile), f"{own.clocks:,.0f}", f"{own.clocks / counted.floor:.2f}", own.bound,
        f"{own.issue:.0%}", own.resident, f"{own.waves:.1f}", least,
        f"{len(each)}, {len(counted.entries) - len(each) - 1}",
    )  # fmt: skip


INTRODUCTION = (
    "`python -m tests.ptx.tiles`: the tile of each row of kernels/tiles.py, at the case that stands"
    " there. One program of each launch is executed, and what all of them do is divided by the peaks"
    " of an A100 (sm80) and an H200 (sm90), `tests/ptx/peaks.py`. *clocks* are those of the resource"
    " that needs most (*by*), summed over the launches of the case; *to the floor*, against the bytes"
    " and flops of the kernel's file (below 1 where those include a copy that is no launch); *issue*, the share of them in which instructions issue;"
    " *programs* a processor holds, by registers and shared memory; *waves* of them. They are counts"
    " at peaks, a lower bound in a model without latency, and no time: `make gpu PART=tune` decides."
    " Left out is what spills, has no room, or has a race. `--order` prints all tiles of a row."
)


def page(found: dict[tuple, Counted], beside: list[str]) -> None:
    """Write the table into docs/codegen.md, and ``beside`` after it."""
    lines = [line(p, found[tuple(p.key)]) for p in places() if tuple(p.key) in found]
    parts = ["## Tiles, by counts", "", INTRODUCTION, "", table(HEAD, [n for n in lines if n]), ""]
    put("tiles", parts + beside)


def into_tiles(found: dict[tuple, Counted]) -> None:
    """Write the words into kernels/tiles.py, in the place of *unmeasured* or of earlier words; a
    row that no target reaches any more is *unmeasured* again."""
    text, said = TILES.read_text(), reasons(found)
    lines = text.splitlines(keepends=True)
    for key, constant in reversed(list(strings(text))):
        if key in said or MARK in constant.value:
            replaced(lines, constant, said.get(key, []))
    TILES.write_text("".join(lines))


def strings(text: str):
    """((table, arch, bits, limit), the constant of its reason) of each row, as they stand."""
    known = {"HALF": 16, "SINGLE": 32, "MAX_RANK": 1024, "MAX_PREFIX": 1024, "MAX_HEAD_DIM": 256}
    tables = next(n.value for n in ast.parse(text).body
                  if isinstance(n, ast.AnnAssign) and n.target.id == "TABLES")  # fmt: skip
    for name, archs in zip(tables.keys, tables.values):
        for arch, rows in zip(archs.keys, archs.values):
            for row in rows.elts:
                bits, limit, _, why = row.args
                limit = known[limit.id] if isinstance(limit, ast.Name) else limit.value
                yield (name.value, arch.value, known[bits.id], limit), why


def replaced(lines: list[str], constant: ast.Constant, said: list[str]) -> None:
    """Put a reason and the words of its targets in the place of a constant."""
    first, last = constant.lineno - 1, constant.end_lineno - 1
    before, after = lines[first][: constant.col_offset], lines[last][constant.end_col_offset :]
    reason = constant.value.partition(MARK)[0].removesuffix("; unmeasured")
    counts = MARK + "; ".join(said) if said else "; unmeasured"
    if len(reason + counts) <= WIDTH:
        each = [reason + counts]
    elif len(counts) - len(MARK) <= WIDTH:
        each = [reason + MARK, counts.removeprefix(MARK)]
    else:
        each = [reason + MARK, *[f"{text}; " for text in said[:-1]], said[-1]]
    indent = " " * 16
    opening = before if before.isspace() else before.rstrip() + "\n" + indent
    lines[first : last + 1] = [opening + f"\n{indent}".join(f'"{part}"' for part in each) + after]
