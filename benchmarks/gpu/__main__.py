"""The proof on a GPU, in parts: ``python -m benchmarks.gpu`` lists them, ``... PART`` runs one.

Each part takes at most eight minutes on one GPU, needs no network, and writes its results as it
goes to ``$OUT`` where that is set, else to benchmarks/results/.
"""

import argparse
import sys

import torch

from benchmarks import host
from pelt_fast.ops.common import native_cuda

from . import (
    counters,
    decoding,
    driver,
    kernels,
    layers,
    models,
    numerics,
    peers,
    sanitizer,
    toolkit,
    tune,
)  # fmt: skip
from .record import SECONDS, Record

PARTS = {
    "1": (
        "numerics",
        numerics.run,
        "every kernel and op against fp64, compiled; every miss is listed",
    ),
    "2": ("sanitizer", sanitizer.run, "compute-sanitizer memcheck and racecheck on small shapes"),
    "3": ("kernels", kernels.run, "each kernel: time, bandwidth, ratio to floor, eager, compile"),
    "4": ("layers", layers.run, "whole layers against the frozen layer and peers: the targets"),
    "5": ("models", models.run, "training steps of whole models: the headline, BART-large MAM"),
    "6": ("peers", peers.run, "layers beside every peer, torch.compile and FlexAttention too"),
    "7": ("decoding", decoding.run, "a token of decoding, methods unmerged, batch 1 to 32"),
    "8": ("counters", counters.run, "DRAM bytes by ncu beside the counted ones"),
    "9": (
        "driver",
        driver.run,
        "the CUDA C++ kernels: driver without torch, numerics, memcheck",
    ),
    "host": (
        "host",
        host.run,
        "microseconds of the host for small calls, in either thread",
    ),
    "tune": ("tune", tune.run, "measure candidates of every table, write the rows that win"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    names = [*PARTS, *(name for name, *_ in PARTS.values() if name not in PARTS)]
    parser.add_argument("part", nargs="?", metavar="PART", help=f"one of {', '.join(names)}")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="the time it has (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.part is None:
        for key, (name, _, what) in PARTS.items():
            print(f"make gpu PART={key:<6} {name:<10} {what}")
        return 0
    found = [part for key, part in PARTS.items() if options.part in (key, part[0])]
    if not found:
        parser.error(f"PART must be one of {', '.join(names)}, got {options.part!r}")
    if not torch.cuda.is_available():
        print("make gpu needs a GPU, and torch sees none: nothing was run", file=sys.stderr)
        return 2
    missing = driver.build_ops(toolkit.found("nvcc")) or native_cuda.why_missing()
    if missing is not None:
        print(f"the CUDA C++ ops are left out: {missing}")
    name, run, _ = found[0]
    record = Record(name, seconds=options.seconds)
    code = run(record, torch.device("cuda", torch.cuda.current_device()))
    for left in record.result["left"]:
        print(f"did not fit in the time: {left}")
    print(f"wrote {record.path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
