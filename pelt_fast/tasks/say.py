"""A line for the user about a run, on standard error."""

import os
import sys


def say(text: str) -> None:
    """Print a line, from the first of several processes alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)
