"""The presets, each a point of the paper's design space."""

import argparse

from pelt_fast.methods import method, methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json NAME prints one preset whole."""
    parser.add_argument("--json", metavar="NAME", help="print one preset as JSON")


def run(options: argparse.Namespace) -> int:
    """Print a line for each modification of each preset."""
    if options.json is not None:
        print(method(options.json).to_json())
        return 0
    for name, config in methods().items():
        print(name)
        for m in config.modifications:
            scale = f" s={m.scale:g}" if m.composition == "scaled" else ""
            print(f"  {m.insertion} {m.form} on {m.target}, {m.composition}{scale}, size {m.size}")
        if not config.modifications:
            print("  the task head alone")
    return 0
