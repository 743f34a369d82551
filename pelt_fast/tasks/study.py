"""Train the rows of the paper's tables; finished runs are skipped.

At the paper's size a row is the task's recipe with the row's method, once for each seed. At small
size (``small.yaml``) models and methods are narrower by one factor. There the learning rate of each
method is chosen on held-out rows of the training split, the evaluation split is scored once, and
every run has its own process. ``results.jsonl`` gets one line for each run; the tables are made
from these lines.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import pelt_fast
from pelt_fast.config import PeltConfig
from pelt_fast.integrations.trainer import last_checkpoint
from pelt_fast.presets import method as preset

from .data import Data, load
from .identity import setting, told_apart
from .loading import load_model
from .meter import losses
from .paper import Row, Table
from .process import alone
from .recipe import Recipe
from .recipe import load as load_recipe
from .registry import task_of
from .results import RESULTS, Results, runs
from .run import result, run, tokens_of
from .scores import compared, digits_of, mean_and_deviation, score
from .train import HELDOUT, fit

__all__ = [
    "RESULTS", "Results", "compared", "digits_of", "factor", "load_recipe", "mean_and_deviation",
    "run_curves", "run_paper", "run_small", "runs", "scaled", "score", "setting",
    "small_settings",
]  # fmt: skip

SMALL = Path(__file__).with_name("small.yaml")
PAPER_SEEDS = (42, 2, 4)
CURVES = (("lora", 1e-3, 8), ("mam_glue", 1e-3, 8))  # preset, rate, size
CURVES_WIDTH = {"sst2": 768, "wmt16": 1024}


def scaled(config: PeltConfig, factor: float) -> PeltConfig:
    """The method with its sizes times ``factor``: on a model narrower by ``factor`` it trains the
    same share of the parameters."""
    return dataclasses.replace(config, modifications=tuple(
        dataclasses.replace(m, size=max(1, round(m.size * factor)) if m.size else 0)
        for m in config.modifications
    ))  # fmt: skip


@dataclass
class Subject:
    """One task of a study: its recipe with the model's folder, and its tokenised rows.

    ``finals`` are the splits that are scored at the end; ``factor`` is our model's width divided by
    the paper's; ``setting`` is the key that all runs of the task share.
    """

    recipe: Recipe
    rows: dict
    finals: list[str]
    classes: tuple[str, ...]
    factor: float
    setting: str

    def fresh(self):
        """Model and tokenizer, loaded again."""
        return load_model(self.recipe, self.classes)


@dataclass(frozen=True)
class Trial:
    """One run of a study: the label of its row, its method, rate and seed.

    Phase "final" is scored on the evaluation split, every other phase on held-out rows. ``backend``
    runs the ops.
    """

    label: str
    config: PeltConfig
    rate: float
    seed: int
    phase: str = "final"
    backend: str = "auto"


def small_settings() -> dict:
    """The settings of ``small.yaml``."""
    return yaml.safe_load(SMALL.read_text())


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def small_subject(task: str, folder: Path, model: str, width: int, **changes) -> Subject:
    """A task at small size; its data files are in ``folder``."""
    settings = small_settings()
    own = settings[task]
    recipe = load_recipe(task).replace(
        model=model, weight_decay=settings["weight_decay"], prefix_rate=settings["prefix_rate"],
        precision="fp32", model_config={}, **own["recipe"],
    ).replace(**changes)  # fmt: skip
    splits = ("train", "heldout", "validation", "test")
    files = {s: [_paths(folder, f) for f in own[s]] for s in splits if s in own}
    data = _small_data(task, files, own)
    _, tokenizer = load_model(recipe, data.classes)
    rows = tokens_of(data, recipe, tokenizer)
    return Subject(recipe, rows, list(data.finals), data.classes, factor(model, width),
                   setting(recipe, own))  # fmt: skip


def _paths(folder: Path, files) -> list[Path]:
    return [folder / file for file in (files if isinstance(files, list) else [files])]


def _small_data(task: str, files: dict, own: dict) -> Data:
    """The splits of a task at small size. Held-out rows come from their own file or from the
    training rows; so does a test split that has no file."""
    heldout = files.pop("heldout", None)
    train, finals, classes = _train_and_finals(task, files, own.get("test_rows"))
    most = own["heldout_rows"]
    if heldout is not None:
        rows = load(task_of(task), {"train": heldout, "validation": heldout}).train
        return Data(train, rows.shuffle(seed=0).select(range(most)), finals, classes)
    parts = train.train_test_split(test_size=most, seed=0)
    return Data(parts["train"], parts["test"], finals, classes)


def _train_and_finals(task: str, files: dict, most: int | None) -> tuple:
    """Training rows, the splits scored at the end (at most ``most`` rows each), and the classes."""
    if "validation" not in files and "test" not in files:
        whole = load(task_of(task), {"train": files["train"], "validation": files["train"]})
        parts = whole.train.shuffle(seed=0).train_test_split(test_size=most, seed=0)
        return parts["train"], {"test": parts["test"]}, ()
    data = load(task_of(task), files)
    finals = {
        name: rows.select(range(min(most, len(rows)))) if most else rows
        for name, rows in data.finals.items()
    }
    return data.train.shuffle(seed=0), finals, data.classes


def train_row(subject: Subject, trial: Trial, output: Path) -> dict:
    """Train and score one run; returns its row of results."""
    _quiet()
    recipe = subject.recipe.replace(learning_rate=trial.rate, seed=trial.seed)
    torch.manual_seed(trial.seed)
    model, tokenizer = subject.fresh()
    pelt_fast.inject(model, trial.config)
    rows = subject.rows
    finals = {HELDOUT: rows["validation"]} if trial.phase != "final" else {
        name: rows[name] for name in subject.finals
    }  # fmt: skip
    with pelt_fast.backend(trial.backend):
        outcome = fit(model, tokenizer, recipe, rows["train"], rows["validation"], finals, output,
                      quiet=True, keep=False)  # fmt: skip
    return {**result(recipe, trial.config, model, outcome), "losses": losses(outcome.log)}


def rates_of(label: str, settings: dict) -> list[float]:
    """The learning rates that a row is tried with."""
    first = label.split()[0].strip(",")
    first = "prefix" if label.startswith("prefix") else first
    return settings["rates"].get(first, settings["rates"]["other"])


def factor(model: str, width: int) -> float:
    """A model's width divided by ``width``, the paper's."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).hidden_size / width


def run_small(table: Table, folder: Path, models: dict[str, str], output: Path, *,
              tasks: tuple[str, ...] | None = None, seeds: tuple[int, ...] | None = None,
              say=print, **changes) -> None:  # fmt: skip
    """Run the rows of a table that have no result in ``output`` yet.

    ``models`` is a model's folder for each task; ``seeds`` replaces the settings'; ``changes`` are
    fields of the recipes.
    """
    _quiet()
    settings, results = small_settings(), Results(output)
    for task in tasks or table.tasks:
        subject = small_subject(task, folder, models[task], table.width, **changes)
        rows = [row for row in table.rows if _wanted(table, row, task)]
        configs = [scaled(row.config, subject.factor) for row in rows]
        rates = [
            _chosen_rate(subject, row.label, config, settings, results, say)
            for row, config in zip(rows, configs)
        ]
        for seed in seeds or settings["seeds"]:  # so every row has as many seeds, at any time
            for row, config, rate in zip(rows, configs, rates):
                _once(subject, Trial(row.label, config, rate, seed), results, say)


def _wanted(table: Table, row: Row, task: str) -> bool:
    """Whether the paper has this number. Our table 2 has rows that the paper does not have."""
    return row.paper.get(task, 0) is not None or table.name == "table2"


def run_curves(folder: Path, models: dict[str, str], output: Path, *, tasks: tuple[str, ...],
               say=print, **changes) -> None:  # fmt: skip
    """Train ``CURVES`` with the fused ops and with the references, from the same seeds."""
    _quiet()
    results, changes = Results(output), small_settings()["curves"] | changes
    for task in tasks:
        subject = small_subject(task, folder, models[task], CURVES_WIDTH[task], **changes)
        for name, rate, size in CURVES:
            config = preset(name).replace(size=size)
            for seed in small_settings()["seeds"][:2]:
                for backend in ("auto", "reference"):
                    trial = Trial(name, config, rate, seed, f"curve-{backend}", backend)
                    _once(subject, trial, results, say)


def run_paper(table: Table, data: Path | None, output: Path, *, tasks, model: str | None,
              seeds: tuple[int, ...], say=print, **changes) -> None:  # fmt: skip
    """Run the rows of a table that have no result in ``output`` yet, with the paper's recipes."""
    results = Results(output)
    for task in tasks:
        for row in table.rows:
            for seed in seeds if _wanted(table, row, task) else ():
                recipe = load_recipe(task).replace(
                    method=row.config.as_dict(), sizes={}, seed=seed, **changes
                )
                recipe = recipe.replace(model=model) if model else recipe
                told = told_apart(setting(recipe), row.config, recipe.learning_rate, seed, "final")
                if told["key"] in results.rows:
                    continue
                folder = output / f"{task}-{told['key']}"
                resume = last_checkpoint(folder) is not None
                if not resume:  # a run that was stopped before its first checkpoint begins anew
                    shutil.rmtree(folder, ignore_errors=True)
                made = run(recipe, None if data is None else data / task, folder, resume=resume,
                           results=folder / RESULTS)  # fmt: skip
                results.add({"label": row.label, **made, **told, "factor": 1.0})
                say(f"{task:<6} {row.label:<36} seed {seed}: {score(made):.2f}")


def _chosen_rate(subject, label: str, config: PeltConfig, settings, results, say) -> float:
    """The rate that is best on held-out rows: of this task, or of the task that it names
    (``rates_of``)."""
    rates, seed = rates_of(label, settings), settings["seeds"][0]
    other = settings[subject.recipe.task].get("rates_of")
    found = {row["learning_rate"]: row for row in runs(results, other, config, "rate")}
    if not set(rates) <= set(found):
        found = {
            rate: _once(subject, Trial(label, config, rate, seed, "rate"), results, say)
            for rate in rates
        }
    return max(rates, key=lambda rate: score(found[rate]))


def _once(subject: Subject, trial: Trial, results: Results, say) -> dict:
    """The row of a run; it is trained now if the results have no such row."""
    told = told_apart(subject.setting, trial.config, trial.rate, trial.seed, trial.phase)
    if told["key"] in results.rows:
        return results.rows[told["key"]]
    made = alone(train_row, subject, trial, results.folder)
    found = results.add({"label": trial.label, **made, **told, "factor": subject.factor})
    say(f"{subject.recipe.task:<6} {trial.label:<36} {trial.phase:<6} rate {trial.rate:g} seed"
        f" {trial.seed}: {score(found):.2f} in {found['seconds']:.0f} s")  # fmt: skip
    return found
