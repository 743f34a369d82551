"""The paper's tables, run: every row a training, skipped where it is done.

At the paper's size a row is the task's recipe with the row's method, once for each seed. At small
size (``small.yaml``) models and methods are narrower by one factor, a learning rate is chosen for
each method on held-out rows of the training split, the evaluation split is scored once, and a run
has a process of its own. Every run is a line of ``results.jsonl``; a table is made of the lines.
"""

import dataclasses
import functools
import hashlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import pelt_fast
from pelt_fast.config import PeltConfig
from pelt_fast.integrations.trainer import last_checkpoint
from pelt_fast.presets import method as preset

from .data import Data, load
from .meter import append_line, losses
from .paper import Row, Table
from .process import alone
from .recipe import Recipe
from .recipe import load as load_recipe
from .registry import task_of
from .run import result, run, tokens_of
from .train import HELDOUT, fit, load_model

RESULTS = "results.jsonl"
SMALL = Path(__file__).with_name("small.yaml")
PAPER_SEEDS = (42, 2, 4)
CURVES = (("lora", 1e-3, 8), ("mam_glue", 1e-3, 8))  # preset, rate, size
CURVES_WIDTH = {"sst2": 768, "wmt16": 1024}


def scaled(config: PeltConfig, factor: float) -> PeltConfig:
    """A method whose sizes are ``factor`` times as large: of a model that much narrower, the same
    share of the parameters."""
    return dataclasses.replace(config, modifications=tuple(
        dataclasses.replace(m, size=max(1, round(m.size * factor)) if m.size else 0)
        for m in config.modifications
    ))  # fmt: skip


def digest(told) -> str:
    """A short name of what JSON can hold."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def setting(recipe: Recipe, data: dict | None = None) -> str:
    """What a task's runs have in common: the model's weights, the data's files and counts, and the
    recipe, but for what tells one run from another."""
    told = {**dataclasses.asdict(recipe), "data": data}
    for name in ("name", "method", "sizes", "learning_rate", "seed"):
        del told[name]
    weights = Path(recipe.model) / "model.safetensors"
    if weights.is_file():
        told["model"] = _hashed(weights, weights.stat().st_mtime_ns)
    return digest(told)


@functools.cache
def _hashed(path: Path, changed: int) -> str:
    """A file's digest, taken once for each time that it changed."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


class Results:
    """The lines of a study's file, by key."""

    def __init__(self, folder: Path):
        self.path = folder / RESULTS
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows = {row["key"]: row for row in map(json.loads, filter(None, lines))}

    def add(self, row: dict) -> dict:
        """One line more."""
        append_line(self.path, row)
        self.rows[row["key"]] = row
        return row


def runs(results: Results, task: str, config: PeltConfig, phase: str) -> list[dict]:
    """The runs of a method, one for each seed and rate, under the task's newest setting."""
    told = task, phase
    found = [row for row in results.rows.values() if (row["task"], row["phase"]) == told]
    method = digest(config.as_dict())
    return [
        row for row in found
        if row["setting"] == found[-1]["setting"] and row["config_key"] == method
    ]  # fmt: skip


@dataclass
class Subject:
    """One task of a study: its recipe, its model's folder, its tokenised rows, made once."""

    recipe: Recipe
    rows: dict
    finals: list[str]
    classes: tuple[str, ...]
    factor: float
    setting: str

    def fresh(self):
        """The model again, as it was."""
        return load_model(self.recipe, self.classes)


def small_settings() -> dict:
    """What ``small.yaml`` says."""
    return yaml.safe_load(SMALL.read_text())


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def small_subject(task: str, folder: Path, model: str, width: int, **changes) -> Subject:
    """A task at small size, of the files in ``folder``."""
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
    """Held-out rows come from a file of theirs or from the training rows, so does a test split that
    is not there."""
    heldout = files.pop("heldout", None)
    if "validation" not in files and "test" not in files:
        whole = load(task_of(task), {"train": files["train"], "validation": files["train"]})
        parts = whole.train.shuffle(seed=0).train_test_split(test_size=own["test_rows"], seed=0)
        train, finals, classes = parts["train"], {"test": parts["test"]}, ()
    else:
        data = load(task_of(task), files)
        train, classes = data.train.shuffle(seed=0), data.classes
        most = own.get("test_rows")
        finals = {
            name: rows.select(range(min(most, len(rows)))) if most else rows
            for name, rows in data.finals.items()
        }
    most = own["heldout_rows"]
    if heldout is not None:
        rows = load(task_of(task), {"train": heldout, "validation": heldout}).train
        return Data(train, rows.shuffle(seed=0).select(range(most)), finals, classes)
    parts = train.train_test_split(test_size=most, seed=0)
    return Data(parts["train"], parts["test"], finals, classes)


def train_row(subject: Subject, config: PeltConfig, rate: float, seed: int, phase: str,
              output: Path, path: str) -> dict:  # fmt: skip
    """One run: phase "rate" is scored on held-out rows, "final" on the evaluation split. ``path``
    is a backend."""
    _quiet()
    recipe = subject.recipe.replace(learning_rate=rate, seed=seed)
    torch.manual_seed(seed)
    model, tokenizer = subject.fresh()
    pelt_fast.inject(model, config)
    rows = subject.rows
    finals = {HELDOUT: rows["validation"]} if phase != "final" else {
        name: rows[name] for name in subject.finals
    }  # fmt: skip
    with pelt_fast.backend(path):
        outcome = fit(model, tokenizer, recipe, rows["train"], rows["validation"], finals, output,
                      quiet=True, keep=False)  # fmt: skip
    return {**result(recipe, config, model, outcome), "losses": losses(outcome.log)}


def rates_of(label: str, settings: dict) -> list[float]:
    """The rates a row is tried at."""
    first = label.split()[0].strip(",")
    first = "prefix" if label.startswith("prefix") else first
    return settings["rates"].get(first, settings["rates"]["other"])


def factor(model: str, width: int) -> float:
    """How much narrower a model is than the paper's."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).hidden_size / width


def run_small(table: Table, folder: Path, models: dict[str, str], output: Path, *,
              tasks: tuple[str, ...] | None = None, seeds: tuple[int, ...] | None = None,
              say=print, **changes) -> None:  # fmt: skip
    """Run what of a table is not in ``output`` yet. ``models``: a model's folder for each task;
    ``seeds``: others than the settings'; ``changes``: of the recipes."""
    _quiet()
    settings, results = small_settings(), Results(output)
    for task in tasks or table.tasks:
        subject = small_subject(task, folder, models[task], table.width, **changes)
        rows = [row for row in table.rows if _wanted(table, row, task)]
        configs = [scaled(row.config, subject.factor) for row in rows]
        rates = [
            _chosen(subject, config, row, settings, results, output, say)
            for row, config in zip(rows, configs)
        ]
        for seed in seeds or settings["seeds"]:  # every row has as many, wherever it stops
            for row, config, rate in zip(rows, configs, rates):
                _once(subject, config, row, rate, seed, "final", results, output, say)


def _wanted(table: Table, row: Row, task: str) -> bool:
    """Whether the paper has a number there; of table 2 we have rows that it has not."""
    return row.paper.get(task, 0) is not None or table.name == "table2"


def run_curves(folder: Path, models: dict[str, str], output: Path, *, tasks: tuple[str, ...],
               say=print, **changes) -> None:  # fmt: skip
    """Train ``CURVES`` on the fused path and on the reference, from the same seeds."""
    _quiet()
    results, changes = Results(output), small_settings()["curves"] | changes
    for task in tasks:
        subject = small_subject(task, folder, models[task], CURVES_WIDTH[task], **changes)
        for name, rate, size in CURVES:
            config = preset(name).replace(size=size)
            for seed in small_settings()["seeds"][:2]:
                for path in ("auto", "reference"):
                    _once(subject, config, Row(name, config, {}), rate, seed, f"curve-{path}",
                          results, output, say, path)  # fmt: skip


def run_paper(table: Table, data: Path | None, output: Path, *, tasks, model: str | None,
              seeds: tuple[int, ...], say=print, **changes) -> None:  # fmt: skip
    """Run what of a table is not in ``output`` yet, at the paper's size with its recipes."""
    results = Results(output)
    for task in tasks:
        for row in table.rows:
            for seed in seeds if _wanted(table, row, task) else ():
                recipe = load_recipe(task).replace(
                    method=row.config.as_dict(), sizes={}, seed=seed, **changes
                )
                recipe = recipe.replace(model=model) if model else recipe
                told = _told(setting(recipe), row.config, recipe.learning_rate, seed, "final")
                if told["key"] in results.rows:
                    continue
                folder = output / f"{task}-{told['key']}"
                resume = last_checkpoint(folder) is not None
                made = run(recipe, None if data is None else data / task, folder, resume=resume,
                           results=folder / RESULTS)  # fmt: skip
                results.add({"label": row.label, **made, **told, "factor": 1.0})
                say(f"{task:<6} {row.label:<36} seed {seed}: {score(made):.2f}")


def _chosen(subject, config, row: Row, settings, results, output, say) -> float:
    """The rate that is best on held-out rows, of this task or the one named in its stead."""
    rates, seed = rates_of(row.label, settings), settings["seeds"][0]
    other = settings[subject.recipe.task].get("rates_of")
    found = {row["learning_rate"]: row for row in runs(results, other, config, "rate")}
    if not set(rates) <= set(found):
        found = {
            rate: _once(subject, config, row, rate, seed, "rate", results, output, say)
            for rate in rates
        }
    return max(rates, key=lambda rate: score(found[rate]))


def _once(subject, config, row: Row, rate, seed, phase, results, output, say, path="auto") -> dict:
    told = _told(subject.setting, config, rate, seed, phase)
    if told["key"] in results.rows:
        return results.rows[told["key"]]
    made = alone(train_row, subject, config, rate, seed, phase, output, path)
    found = results.add({"label": row.label, **made, **told, "factor": subject.factor})
    say(f"{subject.recipe.task:<6} {row.label:<36} {phase:<6} rate {rate:g} seed {seed}:"
        f" {score(found):.2f} in {found['seconds']:.0f} s")  # fmt: skip
    return found


def _told(setting: str, config: PeltConfig, rate: float, seed: int, phase: str) -> dict:
    """What tells one run from every other."""
    method = config.as_dict()
    return {"setting": setting, "phase": phase, "config_key": digest(method),
            "key": digest([setting, method, rate, seed, phase])}  # fmt: skip


def score(row: dict) -> float:
    """The number a run is ranked by, more is better; of a translation its loss taken negative: the
    paper selects by perplexity there."""
    metrics = row["metrics"]
    ranked = ("accuracy", "matched", "rouge2")
    return next((metrics[name] for name in ranked if name in metrics), -metrics.get("loss", 0.0))


def compared(first: list[float], second: list[float]) -> str:
    """What two standard errors of a difference of means say."""
    if min(len(first), len(second)) < 2:
        return "one seed: not judged"
    (a, da), (b, db) = mean_and_deviation(first), mean_and_deviation(second)
    bound = 2 * (da**2 / len(first) + db**2 / len(second)) ** 0.5
    digits = digits_of(a)
    apart, error = f"{a - b:+.{digits}f}", f"{bound:.{digits}f}"
    if abs(a - b) <= bound:
        return f"level: {apart}, inside two standard errors ({error})"
    better = "the first" if a > b else "the second"
    return f"{better} is better: {apart}, two standard errors are {error}"


def digits_of(scored: float) -> int:
    """Decimals worth showing: of per cent one, of a loss, which is taken negative, three."""
    return 3 if scored < 0 else 1


def mean_and_deviation(numbers: list[float]) -> tuple[float, float | None]:
    """None of a single number."""
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
