"""``pelt-fast bench``: from its arguments to a run, a table, a result file and figures.

python -m benchmarks.bench layer --quick
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import arguments, doubts, edges, layer, model, peers, scale, several, text
from .record import Record
from .subjects import Setting

RUNS = Path("runs/bench")
FLOORS = ("frozen", several.ALONE, edges.BELOW)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(given: list[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return run(arguments.parse(given))
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"pelt-fast bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pelt-fast bench: stopped", file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """Run the requested part; returns 0. The table lists refused and failed rows."""
    if options.level == "predict":
        return _predict(options)
    if options.level == "traffic":
        return _traffic(options)
    act, planned = LEVELS["several" if options.several else options.level]
    if options.level != "layer":
        quiet()
    plan = planned(options)
    act.wanted(plan)  # names are checked before anything is written
    peers.chosen(options.peer)
    torch.manual_seed(0)
    load = doubts.loaded(doubts.busy_cores())
    record = _record(options, _part(options, plan.models))
    try:
        act.run(plan, record, progress=sys.stderr.isatty())
    finally:  # an interrupted run keeps and shows its entries
        _finish(options, record, act.report)
        for doubt in filter(None, (load, doubts.spread(record.entries, FLOORS))):
            print(f"read these numbers with care: {doubt}")
    return 0


def _part(options: argparse.Namespace, models: tuple[str, ...]) -> str:
    """The name of the result: the level, and the model's name for the levels layer and model."""
    if options.share is not None:
        return "equal"
    if options.several:
        return "several"
    named = options.level in ("layer", "model") and len(models) == 1
    return f"{options.level}-{models[0]}" if named else options.level


def _record(options: argparse.Namespace, part: str) -> Record:
    seconds = None if options.minutes is None else 60 * options.minutes
    return Record(part, None if options.record else RUNS, seconds, options.json)


def _finish(options: argparse.Namespace, record: Record, report: Callable) -> None:
    print(report(record.entries))
    for left in record.result["left"]:
        print(f"did not fit in the time: {left}")
    print(f"{'wrote' if record.result['finished'] else 'interrupted; wrote'} {record.path}")
    if options.plot is not None:
        from . import figures

        for path in figures.draw(record.path, options.plot):
            print(f"drew {path}")


def _device(options: argparse.Namespace) -> str:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda here, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    return device


def _dtype(options: argparse.Namespace, device: str) -> torch.dtype:
    return DTYPES[options.dtype or ("bf16" if device == "cuda" else "fp32")]


def _given(**values) -> dict:
    return {name: value for name, value in values.items() if value is not None}


def _names(values: list | None) -> tuple | None:
    return None if values is None else tuple(values)


def _layer(options: argparse.Namespace) -> layer.Plan:
    device = _device(options)
    setting = Setting(
        dtype=_dtype(options, device), trained=DTYPES[options.trained], device=device,
        **_given(rows=options.rows, length=options.length),
    )  # fmt: skip
    return dataclasses.replace(
        layer.QUICK if options.quick else layer.Plan(), setting=setting,
        **_given(methods=_names(options.method), models=_names(options.model),
                 peers=_names(options.peer), sizes=_names(options.size),
                 dropouts=_names(options.dropout), repeats=options.repeats),
    )  # fmt: skip


def _model(options: argparse.Namespace) -> model.Plan:
    device = _device(options)
    if options.text is not None:
        text.lengths(options.text)  # a missing file is an error before anything is written
    return dataclasses.replace(
        model.QUICK if options.quick else model.Plan(), device=device,
        dtype=_dtype(options, device), target=options.target,
        **_given(methods=_names(options.method), models=_names(options.model),
                 peers=_names(options.peer), layers=options.layers, rows=options.rows,
                 source=options.length, repeats=options.repeats, text=options.text,
                 share=options.share),
    )  # fmt: skip


def _several(options: argparse.Namespace) -> several.Plan:
    device = _device(options)
    return dataclasses.replace(
        several.Plan(), device=device, dtype=_dtype(options, device),
        counts=tuple(options.several),
        **_given(methods=_names(options.method), models=_names(options.model),
                 layers=options.layers, rows=options.rows, tokens=options.length,
                 repeats=options.repeats),
    )  # fmt: skip


def _scale(options: argparse.Namespace) -> scale.Plan:
    device = _device(options)
    return dataclasses.replace(
        scale.QUICK if options.quick else scale.Plan(), device=device,
        dtype=_dtype(options, device),
        **_given(axes=_names(options.axis), methods=_names(options.method),
                 models=_names(options.model), layers=options.layers, rows=options.rows,
                 length=options.length, repeats=options.repeats),
    )  # fmt: skip


def _edges(options: argparse.Namespace) -> edges.Plan:
    device = _device(options)
    return dataclasses.replace(
        edges.Plan(), device=device, dtype=_dtype(options, device),
        **_given(rows=options.rows, repeats=options.repeats),
    )  # fmt: skip


LEVELS = {
    "layer": (layer, _layer), "model": (model, _model), "several": (several, _several),
    "scale": (scale, _scale), "edges": (edges, _edges),
}  # fmt: skip


def quiet() -> None:
    """Turn off transformers' warnings and progress bars."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _uncompiled() -> None:
    """Without a GPU, define interpreted kernels: they are counted, not launched."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _traffic(options: argparse.Namespace) -> int:
    _uncompiled()
    from . import traffic

    traffic.chosen(options.method)
    record = _record(options, "traffic")
    try:
        traffic.run(record, options.method)
    finally:
        _finish(options, record, traffic.report)
    return 0


def _predict(options: argparse.Namespace) -> int:
    _uncompiled()
    from . import predict, traffic

    device = predict.device(options.device or "h200")
    traffic.chosen(options.method, predict.CASES)
    record = _record(options, f"predict-{device.name}")
    try:
        predict.run(record, device, options.method)
    finally:
        _finish(options, record, predict.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
