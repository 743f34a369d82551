"""The arguments of ``pelt-fast bench``, and the checks of their values."""

import argparse
from pathlib import Path

LEVELS = {
    "layer": "one layer with a method on it, forward and backward, beside every peer's",
    "model": "whole training steps beside the frozen model, full fine-tuning and the peer's",
    "traffic": "bytes moved by each op, counted: no time is measured",
    "predict": "time on a GPU from counted bytes and flops: no GPU is needed",
    "scale": "a step's growth with tokens, layers, rank, prefix length and methods: exponents",
    "edges": "the sizes at which another plan takes over: just above beside just below",
}
SUMMARY = "What a method costs here: layers, models, growth, bytes, or predicted times on a GPU."
PRECISIONS = ("fp32", "bf16", "fp16")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of one run. Raises ValueError for a number outside its range."""
    parser = argparse.ArgumentParser(prog="pelt-fast bench", description=SUMMARY)
    levels = "; ".join(f"{name}: {text}" for name, text in LEVELS.items())
    parser.add_argument("level", choices=LEVELS, help=levels)
    _add_choice(parser)
    _add_sizes(parser)
    _add_run(parser)
    options = parser.parse_args(arguments)
    _check(options)
    return options


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """Arguments for what is measured: methods, models, peers, device."""
    parser.add_argument("--quick", action="store_true", help="the set of a few minutes on a CPU")
    parser.add_argument("--method", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="shapes named by model")
    peers = "default: all; frozen is always in"
    parser.add_argument("--peer", nargs="+", metavar="NAME", help=peers)
    parser.add_argument("--device", default=None, help="predict: h200, a100, ...; else cpu or cuda")
    parser.add_argument("--dtype", choices=PRECISIONS, help="default: bf16 on a GPU")
    trained = "layer: dtype of the trainable weights"
    parser.add_argument("--trained", choices=PRECISIONS, default="fp32", help=trained)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """Arguments for the sizes."""
    parser.add_argument("--size", nargs="+", type=int, help="layer: ranks or prefix lengths")
    parser.add_argument("--dropout", nargs="+", type=float, metavar="P", help="layer: 0 and 0.1")
    parser.add_argument("--rows", type=int, help="rows of a batch")
    parser.add_argument("--length", type=int, help="tokens of a row (model: of a source)")
    parser.add_argument("--target", type=int, default=64, help="model: tokens of a target")
    parser.add_argument("--layers", type=int, help="model: layers of each stack")
    share = "model: every method at this share of the base's parameters"
    parser.add_argument("--share", type=float, metavar="PERCENT", help=share)
    several = "model: this many methods in one batch, beside one alone"
    parser.add_argument("--several", nargs="+", type=int, metavar="N", help=several)
    axes = "scale: which sizes grow; default: all"
    parser.add_argument("--axis", nargs="+", metavar="NAME", help=axes)
    text = "model: a text file; the rows get the lengths of its lines"
    parser.add_argument("--text", type=Path, help=text)


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Arguments for the time of the run and its files."""
    parser.add_argument("--repeats", type=int, help="timed repeats of each")
    parser.add_argument("--minutes", type=float, help="start nothing new after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write figures to this folder")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")


def _check(options: argparse.Namespace) -> None:
    for name in ("rows", "length", "target", "layers", "repeats", "size", "several"):
        for value in _values(options, name):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
    for name in ("share", "minutes"):
        for value in _values(options, name):
            if not value > 0:
                raise ValueError(f"--{name} must be above 0, got {value}")
    for p in _values(options, "dropout"):
        if not 0 <= p < 1:
            raise ValueError(f"--dropout must be in [0, 1), got {p}")


def _values(options: argparse.Namespace, name: str) -> list:
    value = getattr(options, name)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
