"""docs/line-counts.md: how many lines ten jobs take in pelt_fast, PEFT and adapters.

``benchmarks.report`` writes the table from the blocks of the page.
"""

import re

from benchmarks.common import REPOSITORY

PAGE = REPOSITORY / "docs" / "line-counts.md"
LIBRARIES = ("pelt_fast", "PEFT", "adapters")

_JOB = re.compile(r"^## \d+\. (?P<title>.+)$", re.MULTILINE)
_HIDDEN = re.compile(r"^<!-- setup\n.*?^-->\n", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(
    r"^(?P<library>\w+):\n+```python[^\n]*\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)


def lines_of(code: str) -> int:
    """The lines of code that are neither blank nor a comment."""
    lines = (line.strip() for line in code.splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def counts(text: str) -> dict[str, dict[str, int]]:
    """For each job of a page, in its order, the lines of each library that has a block for it."""
    parts = _JOB.split(_HIDDEN.sub("", text))[1:]
    return {
        title: {found["library"]: lines_of(found["code"]) for found in _BLOCK.finditer(body)}
        for title, body in zip(parts[::2], parts[1::2])
    }


def table(text: str) -> str:
    """The table of a page's counts; a dash where a library has no way."""
    rows = [f"| job | {' | '.join(LIBRARIES)} |", f"|---|{'---|' * len(LIBRARIES)}"]
    for title, lines in counts(text).items():
        cells = (str(lines.get(library, "-")) for library in LIBRARIES)
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(rows)
