"""``pelt-fast bench``: from the options of the command to a run, a table, a file and figures."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import layer, model, peers
from .record import Record
from .subjects import Setting

RUNS = Path("runs/bench")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def run(options: argparse.Namespace) -> int:
    """0 when everything ran; what was refused or failed is in the table."""
    if options.level == "predict":
        return _predict(options)
    if options.level == "traffic":
        return _traffic(options)
    if options.level == "layer":
        plan, act = _layer(options), layer
    else:
        quiet()
        plan, act = _model(options), model
    peers.chosen(options.peer)  # names first: a wrong one leaves nothing behind
    if act is layer:
        layer.wanted(plan, options.quick)
    else:
        model.wanted(plan)
    torch.manual_seed(0)
    record = _record(options)
    show = sys.stderr.isatty()
    try:
        if act is layer:
            layer.run(plan, record, options.quick, show)
        else:
            model.run(plan, record, show)
    finally:  # an interrupted run keeps, and shows, what it measured
        _finish(options, record, act.report)
    return 0


def _record(options: argparse.Namespace, name: str | None = None) -> Record:
    seconds = None if options.minutes is None else 60 * options.minutes
    folder = None if options.record else RUNS
    if name is None:
        name = "equal" if options.share is not None else options.level
        if name != "equal" and options.model and len(options.model) == 1:
            name = f"{name}-{options.model[0]}"
    return Record(name, folder, seconds, options.json)


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
    return dataclasses.replace(
        model.QUICK if options.quick else model.Plan(), device=device,
        dtype=_dtype(options, device), target=options.target,
        **_given(methods=_names(options.method), models=_names(options.model),
                 peers=_names(options.peer), layers=options.layers, rows=options.rows,
                 source=options.length, repeats=options.repeats, text=options.text,
                 share=options.share),
    )  # fmt: skip


def quiet() -> None:
    """No warnings and no bars of transformers' own."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _uncompiled() -> None:
    """Let the kernels be defined without a GPU: they are counted, never launched."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def _traffic(options: argparse.Namespace) -> int:
    _uncompiled()
    from . import traffic

    traffic.chosen(options.method)
    record = _record(options)
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
