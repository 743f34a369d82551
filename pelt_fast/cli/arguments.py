"""Arguments that several commands have."""

import argparse
from pathlib import Path


def add_saved(parser: argparse.ArgumentParser) -> None:
    """A saved method and its base."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a saved method")
    base = "the base: a folder or hub name (default: the one that it was trained on)"
    parser.add_argument("--model", metavar="PATH", help=base)


def refuse_full(output: Path) -> None:
    """ValueError for an output that is a file, or a folder with something in it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} is there already and is not empty")


def add_words(parser: argparse.ArgumentParser) -> None:
    """Changes of the method, as ``words`` reads them."""
    changes = "changes of the method: r=8 alpha=16 targets=q,v layers=8-15"
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="WORD=VALUE", dest="words", help=changes
    )
