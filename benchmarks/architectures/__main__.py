"""Inject, forward, backward, eject and parity with plain hooks, for every family of transformers.

``python -m benchmarks.architectures`` runs all families and writes a result; ``--only bert,bloom``
prints some of them; with ``--rest`` it writes a new result, with the other families and methods
of an earlier file; ``--page`` writes docs/architectures.md from the newest committed result.
"""

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from benchmarks.common import load
from benchmarks.record import Record
from pelt_fast.layouts.table import ROWS

from . import page, process, tiny
from .cells import METHODS


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.architectures", description=__doc__)
    parser.add_argument("--only", help="families, with commas between: printed, not written")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas between")
    parser.add_argument("--seconds", type=float, default=90, help="the time that a family has")
    parser.add_argument("--output", type=Path, help="the result's file (by default a new name)")
    parser.add_argument("--rest", type=Path, help="the result with the entries of all others")
    parser.add_argument("--page", action="store_true", help="write docs/architectures.md and end")
    options = parser.parse_args()
    if options.page:
        print(f"wrote {page.write()}")
        return 0
    families, methods = tiny.families(), options.methods.split(",")
    chosen = options.only.split(",") if options.only else list(families)
    unknown = sorted(set(chosen) - families.keys())
    if unknown:
        parser.error(f"--only: no family {', '.join(unknown)}")
    is_kept = options.rest is not None or not options.only
    record = Record("architectures", path=options.output, timed=False) if is_kept else None
    earlier = {} if options.rest is None else load(options.rest)
    rest = {entry["family"]: entry for entry in earlier.get("entries", [])}
    for kind, entry in rest.items():
        if kind not in chosen:
            record.add(**entry)
    wrong = 0
    for kind in chosen:
        started = time.perf_counter()
        modality, class_name = families[kind]
        entry = process.family(kind, class_name, methods, options.seconds)
        row = any(row.model_type == kind for row in ROWS)
        entry |= {"family": kind, "modality": modality, "class": class_name, "row": row}
        wrong += sum("wrong" in cell for cell in entry["cells"].values())
        print(_line(entry, time.perf_counter() - started), flush=True)
        if kind in rest:
            entry["cells"] = rest[kind]["cells"] | entry["cells"]
        if record is None:
            _details(entry)
        else:
            record.add(**entry)
    if record is not None:
        record.entries.sort(key=lambda entry: entry["family"])
        more = {"again": chosen, "rest": options.rest.name} if rest else {}
        record.finish(methods=list(dict.fromkeys([*earlier.get("methods", ()), *methods])), **more)
    return int(wrong > 0)


def _be_quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("pelt_fast").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def _line(entry: dict, seconds: float) -> str:
    if "not_built" in entry:
        return f"{entry['family']:<28} {seconds:5.1f} s  not built: {entry['not_built'][:110]}"
    counts = {
        k: sum(k in c for c in entry["cells"].values())
        for k in ("holds", "refused", "wrong", "unfinished")
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{entry['family']:<28} {seconds:5.1f} s  {told}"


def _details(entry: dict) -> None:
    for method, cell in entry["cells"].items():
        if "holds" not in cell or cell.get("fallbacks"):
            print(f"    {method:<28} {cell}")


if __name__ == "__main__":
    _be_quiet()  # of the whole process: a caller of main() has its own settings
    sys.exit(main())
