"""A line for the user about a run, on standard error."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Print a line, from the first of several processes alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def unsaid(*files: str) -> Iterator[None]:
    """In this block the files of these names, of pelt_fast, log nothing."""
    logger = logging.getLogger("pelt_fast")

    def others(record: logging.LogRecord) -> bool:
        return record.module not in files

    logger.addFilter(others)
    try:
        yield
    finally:
        logger.removeFilter(others)
