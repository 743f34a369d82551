"""Curves of a run, from its log; scores of a table over what its methods train."""

import json
from pathlib import Path

from .meter import LOG
from .paper import Table
from .study import Results, mean_and_deviation, runs, scaled, score


def curves(folder: Path) -> Path | None:
    """Draw loss and metrics over steps to ``curves.svg``; None without a log or matplotlib."""
    path = folder / LOG
    try:
        import matplotlib
    except ImportError:
        return None
    if not path.is_file():
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

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


def bottlenecks(table: Table, results: Results, factors: dict, path: Path) -> Path | None:
    """The paper's Figure 4 to ``path``: a score over the share of parameters that trains, a line
    for each form, the paper's above and ours below (a loss is taken negative). None without
    matplotlib or a run."""
    points = _points(table, results, factors)
    try:
        import matplotlib
    except ImportError:
        return None
    if not points:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in table.tasks if task in points]
    figure, axes = pyplot.subplots(2, len(tasks), figsize=(4.5 * len(tasks), 6), squeeze=False)
    for column, task in zip(axes.T, tasks):
        for form, found in points[task].items():
            share, papers, ours = zip(*sorted(found))
            column[0].semilogx(share, papers, marker="o", label=form)
            column[1].semilogx(share, ours, marker="o", label=form)
        column[0].set(title=f"{task}, paper")
        column[1].set(title=f"{task}, ours", xlabel="parameters trained, %")
        column[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _points(table: Table, results: Results, factors: dict) -> dict:
    """By task and form: share, the paper's score, ours."""
    points: dict[str, dict[str, list]] = {}
    for task in table.tasks:
        for row in table.rows:
            found = runs(results, task, scaled(row.config, factors[task]), "final")
            if found:
                ours, _ = mean_and_deviation([score(run) for run in found])
                form = points.setdefault(task, {}).setdefault(row.label.split(",")[0], [])
                form.append((found[0]["parameters"]["percent"], row.paper[task], ours))
    return points
