"""Arguments that several commands have."""

import argparse
from pathlib import Path


def add_saved(parser: argparse.ArgumentParser) -> None:
    """A saved method and its base."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a saved method")
    base = "the base: a folder or hub name (default: the one that it was trained on)"
    parser.add_argument("--model", metavar="PATH", help=base)
