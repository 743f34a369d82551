"""The Python blocks of a Markdown page: fenced code, and setup that the reader does not see."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# a fence whose language is python, or a comment whose first word is setup; closed on its own line
_BLOCK = re.compile(
    r"^(?:```python(?P<info>[^\n]*)\n(?P<shown>.*?)^```|<!-- setup\n(?P<hidden>.*?)^-->)[ ]*$",
    re.DOTALL | re.MULTILINE,
)
_NO_RUN = "no-run:"


@dataclass(frozen=True)
class Block:
    """``code`` begins behind line ``line`` of its page; ``reason`` says why it is not run."""

    code: str
    line: int
    reason: str | None = None

    def compiled(self, page: Path):
        """The code, compiled so that an error names the line of the page."""
        return compile("\n" * self.line + self.code, str(page), "exec")


def blocks_of(text: str) -> list[Block]:
    """Every Python block of a page, in order. Raises ValueError for an unknown info string."""
    return [_block(found, text) for found in _BLOCK.finditer(text)]


def _block(found: re.Match, text: str) -> Block:
    line = text.count("\n", 0, found.start()) + 1
    if found["hidden"] is not None:
        return Block(found["hidden"], line)
    info = found["info"].strip()
    if info and not info.startswith(_NO_RUN):
        raise ValueError(f"line {line}: ```python {info}: only 'no-run: REASON' may follow")
    return Block(found["shown"], line, info.removeprefix(_NO_RUN).strip() or None)


def named(page: Path) -> str:
    """The page's path below the repository."""
    return page.relative_to(ROOT).as_posix()
