"""The paper's Figure 4: scores over the share of parameters that a method trains."""

from pathlib import Path

from .paper import Table
from .plots import pyplot_here
from .results import Results, runs
from .scores import mean_and_deviation, score
from .study import scaled


def bottlenecks(table: Table, results: Results, factors: dict, path: Path) -> Path | None:
    """Draw the paper's Figure 4 to ``path``: the score over the share of trained parameters, with
    a line for each form; the paper's above, ours below (a loss as a negative number). Returns None
    without matplotlib or without a run."""
    points, pyplot = _points(table, results, factors), pyplot_here()
    if pyplot is None or not points:
        return None
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
