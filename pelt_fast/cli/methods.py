"""The presets, each a point of the paper's design space, and the grid they are points of."""

import argparse
import itertools

from pelt_fast.config import GRID, Modification
from pelt_fast.presets import formula, method, methods


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json NAME prints one preset whole."""
    parser.add_argument("--json", metavar="NAME", help="print one preset as JSON")


def run(options: argparse.Namespace) -> int:
    """Print a line for each modification of each preset, then every point that has meaning."""
    if options.json is not None:
        print(method(options.json).to_json())
        return 0
    print("presets (r, l: size; d: model width; dm: FFN width)")
    for name, config in methods().items():
        print(f"  {name}")
        for m in config.modifications:
            scale = f" s={m.scale:g}" if m.composition == "scaled" else ""
            size = f", size {m.size}" if m.size else ""
            what = f"{m.insertion} {m.form} on {m.target}, {m.composition}{scale}{size}"
            print(f"    {what:<62}{formula(m)}")
        if not config.modifications:
            print("    the task head alone")
    print("\nthe grid: form on target, insertion: compositions")
    for (form, target), insertions in GRID.items():
        for insertion, compositions in insertions.items():
            size = 0 if form in ("bias", "full") else 1
            m = Modification(form, target, insertion, compositions[0], size)
            line = f"{form:<11}on {target:<12}{insertion:<11}{', '.join(compositions)}"
            print(f"  {line:<88}{formula(m)}")
    count = sum(len(c) for c in itertools.chain(*(i.values() for i in GRID.values())))
    print(f"{count} points; --json NAME prints a preset whole")
    return 0
