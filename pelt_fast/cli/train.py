"""Train a recipe: one of the paper's tasks, or rows of your own."""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from pelt_fast.cli.arguments import add_words
from pelt_fast.tasks import recipe as recipes
from pelt_fast.tasks.recipe import QUANTISED, Recipe
from pelt_fast.tasks.registry import TASKS, task_of
from pelt_fast.words import parsed

NUMBERS = [f for f in fields(Recipe) if f.type in (int, float)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, its data, and every number of it."""
    known = ", ".join(path.stem for path in sorted(recipes.FOLDER.glob("*.yaml")))
    parser.add_argument("--recipe", metavar="NAME",
                        help=f"TASK, TASK-PRESET or a YAML file; tasks: {known}")  # fmt: skip
    parser.add_argument("--task", metavar="NAME",
                        help="a task's recipe; with --data alone: classification")  # fmt: skip
    local = "your own files: train, validation, test (.jsonl, .csv, .tsv, parallel text; .gz)"
    local += "; of the task instruct also one file"
    parser.add_argument("--data", type=Path, metavar="FOLDER", help=local)
    parser.add_argument("--model", metavar="PATH", help="a local folder or a hub name")
    parser.add_argument("--method", metavar="NAME", help="a preset (see pelt-fast methods)")
    add_words(parser)
    parser.add_argument("--quantize", choices=QUANTISED[1:],
                        help="4- or 8-bit base (bitsandbytes), of the task instruct")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/train"), metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    results = "where the row of results goes (default: OUTPUT/results.jsonl)"
    parser.add_argument("--results", type=Path, metavar="FILE", help=results)
    parser.add_argument("--dry-run", action="store_true",
                        help="what it needs, on the meta device, and stop")  # fmt: skip
    parser.add_argument("--device", default="h200", help="the GPU a dry run predicts for")
    for item in NUMBERS:
        name = "--" + item.name.replace("_", "-")
        parser.add_argument(name, type=item.type, help="of the recipe")


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that the options select. Raises ValueError for an unknown name or wrong value."""
    if options.task is not None:
        task_of(options.task)
    name = options.recipe or options.task or ("classification" if options.data else None)
    if name is None:
        raise ValueError("--recipe NAME, --task NAME or --data FOLDER is needed")
    if options.method and Path(name).suffix not in (".yaml", ".yml"):
        found = recipes.load(f"{name.partition('-')[0]}-{_preset(options.method)}")
    else:
        found = recipes.load(name)
    changes = {item.name: getattr(options, item.name) for item in NUMBERS}
    changes |= {name: getattr(options, name) for name in ("model", "method", "quantize")}
    found = found.replace(**{name: value for name, value in changes.items() if value is not None})
    return found.reworded(parsed(options.words))


def _preset(name: str) -> str:
    from pelt_fast.presets import method

    method(name)
    return name


def run(options: argparse.Namespace) -> int:
    """Load, inject, train, score, save the method."""
    recipe = recipe_of(options)
    if options.dry_run:
        return _dry_run(recipe, options.device)
    from pelt_fast.tasks.plots import curves
    from pelt_fast.tasks.run import run as run_recipe

    data = options.data or (Path(recipe.data) if recipe.data else None)
    if data is None and TASKS[recipe.task].hub is None:
        raise ValueError(f"task {recipe.task} is of rows of your own: give --data FOLDER")
    row = run_recipe(recipe, data, options.output, resume=options.resume,
                     quiet=not sys.stderr.isatty(),
                     results=options.results or options.output / "results.jsonl")  # fmt: skip
    if int(os.environ.get("RANK", 0)):
        return 0  # the first of several processes speaks
    picture = curves(options.output)
    count, scores = row["parameters"], row["metrics"]
    text = ", ".join(_told(name, value) for name, value in scores.items())
    classes = f", classes {', '.join(row['classes'])}" if row["classes"] else ""
    print(f"{recipe.name}: {row['rows']:,} rows trained on{classes}")
    print(f"{row['method']}: {count['paper']:,} parameters ({count['percent']:.2f} %), a step"
          f" {row['step_seconds']:.3f} s, peak {row['peak_bytes'] / 1e9:.2f} GB")  # fmt: skip
    print(f"{text}; saved to {options.output}{f', curves in {picture}' if picture else ''}")
    return 0


def _told(name: str, value: float) -> str:
    """A score as text. Losses and perplexities are no percentages."""
    unit = "" if name in ("loss", "perplexity") else " %"
    return f"{name.replace('_', ' ')} {value:.2f}{unit}"


def _dry_run(recipe: Recipe, device: str) -> int:
    from pelt_fast.tasks.estimate import DEVICES, estimate
    from pelt_fast.tasks.fitting import without_memory

    if device not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}; got {device!r}")
    found = estimate(without_memory(recipe), recipe)
    steps = recipe.steps or None
    time = found.seconds(device)
    whole = f", {steps:,} steps {steps * time / 3600:.1f} h" if steps else ""
    memory = DEVICES[device][1]
    print(
        f"{recipe.name} on {recipe.model}: base {found.base:,} parameters, {found.trainable:,}"
        f" train ({found.percent:.2f} % by the paper's count)\n"
        f"memory about {found.bytes / 1e9:.1f} GB of the {memory} of a {device}\n"
        f"a step about {1e3 * time:.0f} ms on a {device}{whole} (estimates by counting)"
    )
    return 0
