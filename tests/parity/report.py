"""Write docs/parity.md: the whole grid, run. ``make parity``; --only NAME for one row."""

import argparse
import sys
import time
from pathlib import Path

import transformers

import pelt_fast
from tests.parity import grid

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"
HEAD = """# Every preset on every row

Written by `make parity`, which runs every cell on small random models (`tests/parity/grid.py` says
what a cell checks). **yes** means that it works; a number is a refusal, and its reason is below. These
are the families with a row in the architecture table; [Architectures](architectures.md) has the others.
"""


def short(reason: str | None) -> str | None:
    """A reason without the name of the one model that gave it."""
    if reason is None:
        return None
    first, *rest = reason.split(" ")
    named = "For" in first or first.endswith(("Attention", ":"))
    text = " ".join(rest if named else [first, *rest])
    return text[:1].upper() + text[1:]


_NUMBERS: dict[str, int] = {}


def row(architecture: str, cells: dict[str, str | None], failed: dict[str, str] | None = None):
    """A line of the table; reasons get their numbers in the order they come up."""
    shown = []
    for method, reason in cells.items():
        if failed and method in failed:
            shown.append("**FAILS**")
        elif reason is None:
            shown.append("yes")
        else:
            shown.append(str(_NUMBERS.setdefault(short(reason), len(_NUMBERS) + 1)))
    return f"| {architecture} | {' | '.join(shown)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one architecture, printed and not written")
    only = parser.parse_args().only
    lines, holds, refused, failures = [], 0, 0, {}
    for architecture in [only] if only else sorted(grid.ARCHITECTURES):
        start, cells, failed = time.perf_counter(), {}, {}
        for method in grid.METHODS:
            cells[method] = grid.refusal(architecture, method)
            if cells[method] is None:
                try:
                    grid.hold(architecture, method)
                except Exception as error:
                    failed[method] = f"{type(error).__name__}: {error}"
        holds += sum(reason is None for reason in cells.values()) - len(failed)
        refused += sum(reason is not None for reason in cells.values())
        failures |= {(architecture, method): why for method, why in failed.items()}
        lines.append(row(architecture, cells, failed))
        seconds = time.perf_counter() - start
        print(f"{architecture:<20} {seconds:5.1f} s  {'FAILS' if failed else 'holds'}", flush=True)
    for pair, why in failures.items():
        print(pair, why)
    if only is None:
        TABLE.write_text(document(lines, holds, refused, len(failures)))
        print(f"wrote {TABLE.name}")
    return int(bool(failures))


def document(lines: list[str], holds: int, refused: int, failed: int) -> str:
    """The whole page."""
    versions = f"transformers {transformers.__version__}, pelt_fast {pelt_fast.__version__}"
    names = [name.replace("_", "&#95;") for name in grid.METHODS]
    table = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", *lines]
    reasons = [f"{number}. {reason}" for reason, number in _NUMBERS.items()]
    count = f"{holds + refused + failed} cells: {holds} hold, {refused} refused, {failed} fail"
    return "\n".join([HEAD, f"{count} ({versions}).", "", *table, "", *reasons, ""])


if __name__ == "__main__":
    sys.exit(main())
