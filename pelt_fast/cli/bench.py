"""What a method costs here: layers, whole models, bytes moved, or predicted times on a GPU."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Leave every argument, ``--help`` too, to ``python -m benchmarks.bench``, which parses it."""

    def take_all(arguments=None, namespace=None):
        namespace = argparse.Namespace() if namespace is None else namespace
        namespace.arguments = list(arguments or ())
        return namespace, []

    parser.parse_known_args = take_all


def run(options: argparse.Namespace) -> int:
    """Run ``python -m benchmarks.bench`` of the checkout in a process; returns its exit status.

    Raises RuntimeError if the package is installed without the checkout.
    """
    if not (_CHECKOUT / "benchmarks" / "bench.py").exists():
        raise RuntimeError(
            "the benchmarks are not part of the installed package: run this from a checkout"
            " installed with pip install -e"
        )
    command = [sys.executable, "-m", "benchmarks.bench", *options.arguments]
    process = subprocess.Popen(command, env=os.environ | _paths())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the process is interrupted too: it writes what it measured
            continue


def _paths() -> dict[str, str]:
    """The checkout comes first on the process's path; its working directory is not on it."""
    paths = [str(_CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
