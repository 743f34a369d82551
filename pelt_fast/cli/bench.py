"""What a method costs here: layers, whole models, bytes moved, or predicted times on a GPU."""

import argparse
import importlib
import os
import sys
from pathlib import Path

LEVELS = {
    "layer": "one layer with a method on it, forward and backward, beside every peer's",
    "model": "whole training steps beside the frozen model, full fine-tuning and the peer's",
    "traffic": "bytes moved by each op, counted: no time is measured",
    "predict": "time on a GPU from counted bytes and flops: no GPU is needed",
}
_CHECKOUT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """LEVEL and what narrows it."""
    parser.add_argument(
        "level", choices=LEVELS, help="; ".join(f"{k}: {v}" for k, v in LEVELS.items())
    )
    parser.add_argument("--quick", action="store_true", help="the set of a few minutes on a CPU")
    parser.add_argument("--method", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="shapes named by model")
    parser.add_argument(
        "--peer", nargs="+", metavar="NAME", help="default: all; frozen is always in"
    )
    parser.add_argument("--device", default=None, help="predict: h200, a100, ...; else cpu or cuda")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU")
    parser.add_argument("--trained", choices=("fp32", "bf16", "fp16"), default="fp32",
                        help="layer: dtype of the trainable weights")  # fmt: skip
    parser.add_argument("--size", nargs="+", type=int, help="layer: ranks or prefix lengths")
    parser.add_argument("--dropout", nargs="+", type=float, metavar="P", help="layer: 0 and 0.1")
    parser.add_argument("--rows", type=int, help="rows of a batch")
    parser.add_argument("--length", type=int, help="tokens of a row (model: of a source)")
    parser.add_argument("--target", type=int, default=64, help="model: tokens of a target")
    parser.add_argument("--layers", type=int, help="model: layers of each stack")
    share = "model: every method at this share of the base's parameters"
    parser.add_argument("--share", type=float, metavar="PERCENT", help=share)
    parser.add_argument("--text", type=Path, help="model: a file whose line lengths rows have")
    parser.add_argument("--repeats", type=int, help="timed repeats of each")
    parser.add_argument("--minutes", type=float, help="start nothing new after them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write figures there")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")


def run(options: argparse.Namespace) -> int:
    """Run one level of ``benchmarks/`` and print its table."""
    _find_benchmarks()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("rows", "length", "target", "layers", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for name in ("share", "minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value}")
    for size in options.size or ():
        if size < 1:
            raise ValueError(f"--size must be at least 1, got {size}")
    for p in options.dropout or ():
        if not 0 <= p < 1:
            raise ValueError(f"--dropout must be in [0, 1), got {p}")
    runner = importlib.import_module("benchmarks.bench")
    return runner.run(options)


def _find_benchmarks() -> None:
    """benchmarks/ is of the checkout, not of the installed package."""
    if not (_CHECKOUT / "benchmarks" / "bench.py").exists():
        raise RuntimeError(
            "the benchmarks are not part of the installed package: run this from a checkout"
            " installed with pip install -e"
        )
    if str(_CHECKOUT) not in sys.path:
        sys.path.insert(0, str(_CHECKOUT))
