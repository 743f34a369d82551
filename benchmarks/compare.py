"""Lists what became slower or larger between two results of the same part, beyond their noise.

    python -m benchmarks.compare A.json B.json

Times are compared as ratios to the frozen layer or model of the same run, if the run has one. So
results of two machines, or of two loads, can be compared. A time has changed when the quartiles of
A and B do not overlap and the medians differ by 3 % or more; a count when it differs by 1 %.
Exit status 1 when something is worse, 2 for bad input.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import layer, model
from .common import load
from .timing import quartiles

LEAST_TIME, LEAST_COUNT = 0.03, 0.01
COUNTS = ("saved_bytes", "peak_bytes", "trainable", "checkpoint_bytes", "both", "bytes")
KEYS = ("layer", "subject", "model", "layers", "method", "provider", "mode", "device")


@dataclass(frozen=True)
class Change:
    """One quantity of one row, B to A."""

    what: str
    ratio: float

    def __str__(self) -> str:
        kind = "worse" if self.ratio > 1 else "better"
        return f"{kind:<6} {self.ratio:5.2f} x  {self.what}"


def keyed(result: dict, path: Path) -> dict[tuple, dict]:
    """The rows of a result, by the quantity that they measure."""
    part, entries = result.get("part"), result.get("entries")
    if part is None or entries is None:
        raise ValueError(f"{path} has no rows to compare: it was not written by pelt-fast bench")
    if part == "layer":
        entries = layer.rows(entries)
    elif part in ("model", "equal"):
        entries = model.rows(entries)
    return {tuple((k, e[k]) for k in KEYS if k in e): e for e in entries}


def spread(row: dict) -> tuple[float, float, float] | None:
    """Quartiles of the times."""
    for key in ("ratio", "to_frozen"):
        found = row.get(key)
        if isinstance(found, (tuple, list)) and found[1] == found[1]:  # not NaN
            return found
    seconds = row.get("seconds")
    if seconds is None:
        return None
    return quartiles(seconds) if isinstance(seconds, list) else (seconds,) * 3


def changes(a: dict[tuple, dict], b: dict[tuple, dict]) -> Iterator[Change]:
    """Everything that differs beyond its noise in the rows both have."""
    for key in a.keys() & b.keys():
        name = ", ".join(str(value) for _, value in key)
        before, after = spread(a[key]), spread(b[key])
        if before and after and (after[0] > before[2] or after[2] < before[0]):
            ratio = after[1] / before[1]
            if abs(ratio - 1) >= LEAST_TIME:
                yield Change(f"time of {name}", ratio)
        for count in COUNTS:
            old, new = a[key].get(count), b[key].get(count)
            # a resident set is as noisy as the allocator below it
            least = 0.05 if count == "peak_bytes" else LEAST_COUNT
            if old and new and abs(new / old - 1) >= least:
                yield Change(f"{count} of {name}", new / old)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    options = parser.parse_args(arguments)
    try:
        results = [load(path) for path in (options.a, options.b)]
        if results[0].get("part") != results[1].get("part"):
            raise ValueError(f"{options.a} is of part {results[0].get('part')!r}, {options.b} of"
                             f" {results[1].get('part')!r}")  # fmt: skip
        rows = [keyed(r, p) for r, p in zip(results, (options.a, options.b))]
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    found = sorted(changes(*rows), key=lambda change: -change.ratio)
    common = len(rows[0].keys() & rows[1].keys())
    for change in found:
        print(change)
    print(f"{common} rows in both, {len(found)} changes; {len(rows[0]) - common} only in A,"
          f" {len(rows[1]) - common} only in B")  # fmt: skip
    return int(any(change.ratio > 1 for change in found))


if __name__ == "__main__":
    sys.exit(main())
