"""``make emulate``: the tests of the kernels on the machine, and a line a kernel x target x dtype.

``python -m tests.ptx.emulate [--targets sm80 sm90] [--orders early late shuffled] [-k EXPRESSION]
[--whole]``: of the tests' parameters every pair of values (``tests/quick.py``), or every combination.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .plugin import ORDERS

TESTS = ["tests/numerics", "tests/ptx/model_step.py", "tests/ptx/known_races.py",
         "tests/ptx/cuda_grid.py"]  # fmt: skip
HEAD = ("kernel", "target", "dtype", "launches", "error / budget", "instructions", "sectors / least",
        "wavefronts / least", "seconds")  # fmt: skip


def run_tests(target: str, order: str, report: Path, arguments: list[str]) -> int:
    """The tests in a process of their own; its exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.ptx.plugin", "-n", "auto",
               "--machine", target, "--order", order, "--report", str(report), *arguments]  # fmt: skip
    print(f"{target}, {order}:", flush=True)
    return subprocess.run(command).returncode


def run_mutants() -> int:
    """Whether each broken copy of csrc/cuda is caught."""
    print("broken copies of csrc/cuda:", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "tests/ptx/test_cuda_mutants.py"]
    return subprocess.run(command, env={**os.environ, "PELT_FAST_MUTANTS": "all"}).returncode


def read(report: Path) -> list[dict]:
    """What the processes of a run wrote."""
    return [json.loads(line) for path in report.glob("*.jsonl") for line in path.open()]


def rows(records: list[dict]) -> list[tuple]:
    """The table: what the launches of each kernel, target and dtype came to. The error is the worst
    of the tests that launched it; a dash where none of them has a budget."""
    found: dict[tuple, collections.Counter] = collections.defaultdict(collections.Counter)
    worst: dict[tuple, float] = {}
    for record in records:
        for launch in record["launches"]:
            key = (launch["kernel"], record["target"], launch["dtype"])
            if record["worst"] is not None:
                worst[key] = max(worst.get(key, 0.0), record["worst"])
            sums = found[key]
            sums["launches"] += 1
            for name in ("instructions", "sectors", "least", "wavefronts", "free", "seconds"):
                sums[name] += launch[name]
    return [
        (*key, sums["launches"], f"{worst[key]:.2f}" if key in worst else "-",
         f"{sums['instructions']:,}",
         ratio(sums["sectors"], sums["least"]), ratio(sums["wavefronts"], sums["free"]),
         f"{sums['seconds']:.1f}")
        for key, sums in sorted(found.items())
    ]  # fmt: skip


def ratio(count: int, least: int) -> str:
    """A count over the least that it could be."""
    return f"{count / least:.2f}" if least else "-"


def table(head: tuple[str, ...], lines: list[tuple]) -> str:
    """As Markdown."""
    cells = [head, *[tuple(map(str, line)) for line in lines]]
    widths = [max(len(row[n]) for row in cells) for n in range(len(head))]
    shown = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    return "\n".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:]])


def main(arguments: list[str] | None = None) -> int:
    """Run everything that is asked for; 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.emulate", description=__doc__)
    parser.add_argument("--targets", nargs="+", default=["sm80", "sm90"], choices=["sm80", "sm90"])
    parser.add_argument("--orders", nargs="+", default=["early"], choices=list(ORDERS))
    parser.add_argument("-k", dest="expression", default=None, help="pytest's -k")
    parser.add_argument("--whole", action="store_true", help="every combination of parameters")
    parser.add_argument("tests", nargs="*", default=TESTS)
    given = parser.parse_args(arguments)
    chosen = [*given.tests, *(["-k", given.expression] if given.expression else [])]
    chosen += [] if given.whole else ["--quick"]
    failed, records = 0, []
    for target in given.targets:
        for order in given.orders:
            with tempfile.TemporaryDirectory() as folder:
                failed |= run_tests(target, order, Path(folder), chosen)
                records += read(Path(folder))
    if given.tests == TESTS and not given.expression:
        failed |= run_mutants()
    print(table(HEAD, rows(records)))
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main())
