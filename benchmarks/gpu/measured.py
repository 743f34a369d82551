"""The tables of kernels/tuned.py during tuning: used at once, and written as a file."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pelt_fast.kernels import config, tuned
from pelt_fast.kernels.tile import HALF, Tile

TYPES = {
    "TILES": "dict[str, dict[str, tuple]]",
    "PLANS": "dict[str, tuple]",
    "CONTEXT": "dict[str, str]",
    "ONE_PASS": "dict[str, str]",
    "FUSED_RANK": "dict[str, dict[str, int]]",
}


def _copies() -> dict[str, dict]:
    return {
        name: {
            key: dict(v) if isinstance(v, dict) else v for key, v in getattr(tuned, name).items()
        }
        for name in TYPES
    }


@dataclass
class Tables:
    """Every table by its name; at first the tables of tuned.py."""

    tables: dict[str, dict] = field(default_factory=_copies)

    def __getitem__(self, name: str) -> dict:
        return self.tables[name]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Context: the kernels read these tables."""
        before = {name: getattr(tuned, name) for name in TYPES}
        try:
            self._put(self.tables)
            yield
        finally:
            self._put(before)

    @staticmethod
    def _put(tables: dict[str, dict]) -> None:
        for name, table in tables.items():
            setattr(tuned, name, table)
        config.rows.cache_clear()

    def set_rows(self, table: str, arch: str, rows: dict[int, tuple[Tile, str]]) -> None:
        """Put the 16-bit rows of a table: limit -> (tile, why)."""
        kept = [row for row in self["TILES"].get(table, {}).get(arch, ())
                if row[0] != HALF or row[1] not in rows]  # fmt: skip
        new = [(HALF, limit, asdict(tile), why) for limit, (tile, why) in rows.items()]
        merged = tuple(sorted([*kept, *new], key=lambda row: row[:2]))
        self["TILES"].setdefault(table, {})[arch] = merged
        config.rows.cache_clear()

    def write(self, to: Path, beside: Path) -> None:
        """Rewrite ``to``, and write a copy next to the result file ``beside``."""
        head = tuned.__doc__.replace(" Empty until a GPU has run it.", "")
        body = "\n".join(f"{name}: {kind} = {_source(self[name])}" for name, kind in TYPES.items())
        text = f'"""{head}"""\n\n# ruff: noqa: E501\n# fmt: off\n{body}\n# fmt: on\n'
        for path in (to, beside.with_suffix(".tuned.py")):
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(text)
            os.replace(part, path)


def _source(value, indent: str = "") -> str:
    """The literal of a table: each entry of its dicts and each of its rows on a line."""
    below, rows = indent + "    ", isinstance(value, tuple)
    if not rows and not all(isinstance(each, (dict, tuple)) for each in value.values()):
        return repr(value)
    if rows:
        lines = [repr(row) for row in value]
    else:
        lines = [f"{name!r}: {_source(each, below)}" for name, each in value.items()]
    opened, closed = "()" if rows else "{}"
    return "".join([f"{opened}\n", *(f"{below}{line},\n" for line in lines), indent, closed])
