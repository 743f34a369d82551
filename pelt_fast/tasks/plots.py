"""Curves of a run, from its log."""

import json
from pathlib import Path

from .meter import LOG


def pyplot_here():
    """matplotlib's pyplot, drawing without a screen; None when it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(folder: Path) -> Path | None:
    """Draw loss and metrics over steps to ``curves.svg``; None without a log or matplotlib."""
    path, pyplot = folder / LOG, pyplot_here()
    if pyplot is None or not path.is_file():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = sorted({key for row in rows for key in row if key.startswith("eval_")
                     and key.rpartition("_")[2] in ("accuracy", "bleu", "rouge2")})  # fmt: skip
    figure, axes = pyplot.subplots(1, 1 + bool(scores), figsize=(9, 3.2), squeeze=False)
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes[0, 0].plot(*zip(*points), label=label)
    axes[0, 0].set(xlabel="step", ylabel="loss")
    axes[0, 0].legend()
    for name in scores:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes[0, 1].plot(*zip(*points), marker="o", label=name.removeprefix("eval_"))
    if scores:
        axes[0, 1].set(xlabel="step", ylabel="%")
        axes[0, 1].legend()
    figure.tight_layout()
    target = folder / "curves.svg"
    figure.savefig(target)
    pyplot.close(figure)
    return target
