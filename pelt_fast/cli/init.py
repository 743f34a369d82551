"""Look at a model and a folder of rows, and write a recipe that trains one on the other."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the rows, and where the recipe goes."""
    parser.add_argument("--model", required=True, metavar="PATH", help="a folder or a hub name")
    rows = "your own files: train, perhaps validation and test (.jsonl, .csv, .tsv; .gz)"
    rows += "; for a causal language model also one file"
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help=rows)
    parser.add_argument("--method", metavar="NAME", help="a preset (default: the task's)")
    parser.add_argument("--output", type=Path, default=Path("recipe.yaml"), metavar="FILE",
                        help="a new file (default: recipe.yaml)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Look, fit, write; then say how to train."""
    from pelt_fast.formats.files import write_files
    from pelt_fast.presets import method
    from pelt_fast.tasks.fitting import fitted
    from pelt_fast.tasks.look import look
    from pelt_fast.tasks.written import text

    if options.output.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--output must end with .yaml, got {options.output}")
    if options.output.exists():
        raise ValueError(f"--output: {options.output} is there already")
    if options.method is not None:
        method(options.method)  # an unknown name is reported before anything is loaded
    seen = look(options.model, options.data, options.method)
    fit = fitted(seen.recipe, seen.config)
    content = text(seen, fit)
    write_files(options.output.parent, {options.output.name: lambda part: part.write_text(content)},
                "the recipe")  # fmt: skip
    recipe = fit.recipe
    print(f"{options.output}: task {recipe.task}, rows of {seen.form}, up to {recipe.max_length:,}"
          f" tokens, about {fit.needed / 1e9:.2f} GB on this {fit.device}\n"
          f"pelt-fast train --recipe {options.output}")  # fmt: skip
    return 0
