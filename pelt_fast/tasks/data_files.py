"""What is wrong with a file of rows, told from its beginning, before ``datasets`` reads it."""

import codecs
import gzip
import zlib
from pathlib import Path

from .say import first_line

PART = 1 << 16  # bytes
SHOWN = 20  # bytes of a file that is of another format


def true_suffix(path: Path) -> str:
    """The ending that says how a file is read."""
    return Path(path.name.removesuffix(".gz")).suffix


def check_file(path: Path) -> None:
    """ValueError for a file that is empty, or that its ending describes wrongly. A JSON value that
    is no object would end the process inside the reader."""
    try:
        start = _beginning(path)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None
    if not start:
        raise ValueError(f"--data: {path.name} is empty")
    if true_suffix(path) in (".json", ".jsonl") and start[:1] not in (b"{", b"["):
        raise ValueError(
            f"--data: {path.name} cannot be read: a row of JSON is an object, and the file begins"
            f" with {start[:SHOWN].decode('utf-8', 'replace')!r}"
        )


def _beginning(path: Path) -> bytes:
    """The first part of a file that is no white space; b"" of an empty one."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        first = True
        while part := file.read(PART):
            part = part.removeprefix(codecs.BOM_UTF8) if first else part
            first = False
            if part.strip():
                return part.lstrip()
    return b""


def check_text(rows, columns: list[str], split: str) -> None:
    """ValueError for a column that holds something else than text, or a row without it."""
    for name in columns:
        kind = getattr(rows.features[name], "dtype", type(rows.features[name]).__name__.lower())
        empty = rows.data.column(name).null_count
        if kind not in ("string", "large_string") and empty < len(rows):
            raise ValueError(f"--data: {name} of {split} holds values of {kind}: text is needed")
        row = next((i for i, text in enumerate(rows[name], 1) if text is None), 0) if empty else 0
        if row:
            raise ValueError(f"--data: row {row} of {split} has no {name}: text is needed")


def unreadable(path: Path, error: BaseException) -> ValueError:
    """The error of a file that a reader could not read, with the first line of its reason."""
    return ValueError(f"--data: {path.name} cannot be read: {first_line(error)}")
