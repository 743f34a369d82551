"""Tables of a study: our scores and the paper's, with deviations, parameters and costs."""

from .paper import Table
from .registry import task_of
from .results import Results, runs
from .scores import mean_and_deviation
from .study import scaled


def shown(task: str, rows: list[dict]) -> str:
    """Mean and standard deviation over seeds of each metric of the task; "" without a run."""
    if not rows:
        return ""
    found = []
    for name in _metrics(task, rows):
        mean, deviation = mean_and_deviation([row["metrics"][name] for row in rows])
        digits = 3 if name == "loss" else 1
        spread = f" ± {deviation:.{digits}f}" if deviation is not None else ""
        found.append(f"{mean:.{digits}f}{spread}")
    return " / ".join(found)


def _metrics(task: str, rows: list[dict]) -> list[str]:
    return [name for name in task_of(task).metrics if name in rows[0]["metrics"]]


def printed(paper) -> str:
    """The paper's numbers of a cell."""
    if paper is None:
        return ""
    return " / ".join(f"{x:.1f}" for x in (paper if isinstance(paper, tuple) else (paper,)))


def table_rows(table: Table, results: Results, factors: dict[str, float]) -> list[list[str]]:
    """A header and a line for each row of ``table``. ``factors`` has for each task our model's
    width divided by the paper's (1: the paper's size)."""
    header = ["method", "parameters %"]
    for task in table.tasks:
        header += [f"{task}, paper", f"{task}, ours", "rate", "step s", "peak GB"]
    lines = [header]
    for row in table.rows:
        line, share = [], ""
        for task in table.tasks:
            found = runs(results, task, scaled(row.config, factors[task]), "final")
            rate = f"{found[0]['learning_rate']:g}" if found else ""
            step = f"{min(r['step_seconds'] for r in found):.2f}" if found else ""
            peak = f"{max(r['peak_bytes'] for r in found) / 1e9:.2f}" if found else ""
            line += [printed(row.paper.get(task)), shown(task, found), rate, step, peak]
            if found:
                share = f"{found[0]['parameters']['percent']:.2f}"
        lines.append([row.label, share, *line])
    return lines


def text(lines: list[list[str]]) -> str:
    """A Markdown table with aligned columns; empty columns are left out."""
    keep = [i for i in range(len(lines[0])) if i == 0 or any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in keep] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(keep))]
    body = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([body[0], rule, *body[1:]])
