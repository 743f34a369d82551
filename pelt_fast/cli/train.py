"""Fine-tune a classifier by a method, on a local folder or a GLUE task."""

import argparse
from dataclasses import fields
from pathlib import Path

from pelt_fast.methods import method
from pelt_fast.tasks.train import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, model, method and the recipe."""
    source = parser.add_mutually_exclusive_group(required=True)
    local = "train and validation files (.jsonl, .csv, .tsv; text and label)"
    source.add_argument("--data", type=Path, metavar="FOLDER", help=local)
    source.add_argument("--task", metavar="NAME", help="sst2 or mnli, from the hub")
    parser.add_argument("--model", required=True, help="a local folder or a hub name")
    parser.add_argument("--method", default="mam_glue", help="a preset (see pelt-fast methods)")
    parser.add_argument("--output", type=Path, default=Path("runs/train"), metavar="FOLDER")
    for item in fields(Recipe):
        name = "--" + item.name.replace("_", "-")
        kind = float if item.name in ("epochs", "learning_rate") else int
        default = item.default if item.default is not None else "by method"
        parser.add_argument(name, type=kind, default=item.default, help=f"default: {default}")


def _recipe(options: argparse.Namespace) -> Recipe:
    recipe = Recipe(**{item.name: getattr(options, item.name) for item in fields(Recipe)})
    for name in ("epochs", "batch_size", "max_length"):
        if getattr(recipe, name) <= 0:
            raise ValueError(
                f"--{name.replace('_', '-')} must be positive, got {getattr(recipe, name)}"
            )
    if recipe.learning_rate is not None and not 0 < recipe.learning_rate < 1:
        raise ValueError(f"--learning-rate must be in (0, 1), got {recipe.learning_rate}")
    return recipe


def run(options: argparse.Namespace) -> int:
    """Load, inject, train, save the method."""
    import pelt_fast
    from pelt_fast.tasks import data
    from pelt_fast.tasks.train import fit, load_classifier

    method(options.method)
    recipe = _recipe(options)
    found = data.from_folder(options.data) if options.data else data.from_glue(options.task)
    model, tokenizer = load_classifier(options.model, len(found.classes))
    pelt_fast.inject(model, options.method)
    count = pelt_fast.count_parameters(model)
    print(f"{options.method}: {count.paper:,} parameters ({count.percent:.2f} %),"
          f" {len(found.train)} rows to train on, classes {', '.join(found.classes)}")  # fmt: skip
    accuracy = fit(model, tokenizer, found, recipe, options.method, options.output)
    pelt_fast.save(model, options.output)
    print(f"accuracy {accuracy:.2f} % on {len(found.evaluation)} rows; saved to {options.output}")
    return 0
