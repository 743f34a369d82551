"""Rows of a task, read with ``datasets``: from the hub by name, or from a folder; those of a causal
task also from one file.

A folder holds ``train`` and ``validation`` (or ``dev``), perhaps ``test``, as .jsonl, .json, .csv
or .tsv, or a translation's splits as parallel text (``train.en``, ``train.ro``); all plain or .gz.
Columns have one of the names in ``registry.COLUMNS``, or of ``instruct.rows.FORMS``. Rows are in
``datasets``' cache on disk, not in memory.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .data_files import check_file, check_text, true_suffix, unreadable
from .instruct import rows as instruct_rows
from .registry import COLUMNS, Task

_READERS = {".jsonl": ("json", {}), ".json": ("json", {}), ".csv": ("csv", {}),
            ".tsv": ("csv", {"delimiter": "\t", "quoting": 3})}  # fmt: skip
_SPLITS = {"train": ("train",), "validation": ("validation", "dev", "valid"), "test": ("test",),
           "validation_matched": ("validation_matched", "dev_matched"),
           "validation_mismatched": ("validation_mismatched", "dev_mismatched")}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """The splits of a task. ``validation`` selects the checkpoint; ``finals`` are scored at the
    end, by name. Columns are text, pair, label or source, target. ``classes`` are the names of a
    classification's classes."""

    train: object
    validation: object
    finals: dict
    classes: tuple[str, ...] = ()


def _datasets():
    try:
        import datasets
    except ImportError:
        raise RuntimeError("reading data needs the extra: pip install 'pelt_fast[train]'") from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # a failure is said once, by us
    return datasets


def load(task: Task, folder: str | Path | dict[str, list] | None = None) -> Data:
    """The rows of ``task``: from a folder, from files by split, or from the hub (None).

    A split has a list of files, which are joined; each is a path, or two paths of parallel text.

    Raises FileNotFoundError where a split is missing, ConnectionError where the hub cannot be
    reached, ValueError for a missing column, an empty split, a label outside the classes.
    """
    if isinstance(folder, dict):
        splits = {split: _joined(task, files) for split, files in folder.items()}
    else:
        splits = _from_hub(task) if folder is None else _from_folder(task, Path(folder))
    classes = task.classes
    if classes and folder is not None:
        classes = _classes(task, splits["train"])
    splits = {name: _canonical(task, rows, classes, name) for name, rows in splits.items()}
    if task.causal and "train" in splits and "validation" not in splits:
        splits |= instruct_rows.held_out(splits["train"])
    finals = {}
    for name, choices in task.finals.items():
        found = next((split for split in choices if split in splits), None)
        if found is not None:
            finals[name] = splits[found]
    first = next((s for s in ("validation", "validation_matched", "test") if s in splits), None)
    if "train" not in splits or first is None:
        raise FileNotFoundError(f"{folder}: a train and a validation split are needed")
    return Data(splits["train"], splits[first], finals, classes)


def _from_folder(task: Task, folder: Path) -> dict:
    if folder.is_file() and task.causal and true_suffix(folder) in _READERS:
        return {"train": _read(task, [folder])}
    if not folder.is_dir():
        kinds = f", nor a file of {', '.join(_READERS)}" if task.causal else ""
        raise FileNotFoundError(f"--data: {folder} is not a folder{kinds}")
    found = {split: _find(task, folder, stems) for split, stems in _SPLITS.items()}
    found = {split: paths for split, paths in found.items() if paths}
    if "train" not in found or (len(found) < 2 and not task.causal):
        wanted = ", ".join(f"train{suffix}" for suffix in _READERS)
        if task.languages:
            wanted += " or " + " and ".join(f"train.{code}" for code in task.languages)
        what = "train" if "train" not in found else "validation, dev or test"
        raise FileNotFoundError(
            f"--data: {folder} has no {what} split; it holds none of {wanted} (or .gz of them), the"
            " other splits likewise"
        )
    return {split: _read(task, paths) for split, paths in found.items()}


def _joined(task: Task, files: list):
    """The rows of several files, in the order of the files."""
    tables = []
    for paths in files:
        paths = [Path(path) for path in (paths if isinstance(paths, (list, tuple)) else [paths])]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"--data: {missing[0]} is not there")
        tables.append(_read(task, paths))
    return tables[0] if len(tables) == 1 else _datasets().concatenate_datasets(tables)


def _find(task: Task, folder: Path, stems: Sequence[str]) -> list[Path]:
    """The file of a split, or its two files of parallel text; [] without one."""
    for stem in stems:
        for suffix in _READERS:
            for ending in (suffix, f"{suffix}.gz"):
                if (folder / f"{stem}{ending}").is_file():
                    return [folder / f"{stem}{ending}"]
        if task.languages:
            for gz in ("", ".gz"):
                pair = [folder / f"{stem}.{code}{gz}" for code in task.languages]
                if all(path.is_file() for path in pair):
                    return pair
    return []


def _read(task: Task, paths: list[Path]):
    for path in paths:
        check_file(path)
    if len(paths) == 2:
        return _parallel(paths)
    (path,) = paths
    kind, options = _READERS[true_suffix(path)]
    return _rows(path, kind, **options)


def _parallel(paths: list[Path]):
    """Rows of two files of text, of as many lines."""
    sides = [_rows(path, "text") for path in paths]
    if len(sides[0]) != len(sides[1]):
        lines = f"{paths[0].name} has {len(sides[0])} lines, {paths[1].name} {len(sides[1])}"
        raise ValueError(f"--data: {lines}")
    named = [s.rename_column("text", n) for s, n in zip(sides, ("source", "target"))]
    return _datasets().concatenate_datasets(named, axis=1)


def _rows(path: Path, kind: str, **options):
    try:
        rows = _datasets().load_dataset(kind, data_files=str(path), split="train", **options)
        rows.data.table.validate(full=True)  # text that is no UTF-8 would fail where it is used
        return rows
    except Exception as error:  # readers raise many kinds of errors for a damaged file
        cause = error.__cause__ or error
        if "no data" in str(cause):
            raise ValueError(f"--data: {path.name} is empty") from None
        raise unreadable(path, cause) from None


def _from_hub(task: Task) -> dict:
    if task.hub is None:
        raise ValueError(f"task {task.name} is of rows of your own: give --data FOLDER")
    datasets, (name, config) = _datasets(), task.hub
    # the hub's client would report every retry; one error below is enough
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:
        raise ConnectionError(
            f"{name} of task {task.name}: the hub cannot be reached ({type(error).__name__}); give"
            " the files yourself with --data FOLDER (see pelt_fast/tasks/data.py)"
        ) from None


def _classes(task: Task, train) -> tuple[str, ...]:
    """The task's classes if the rows have no others; else the rows' own, sorted."""
    _column(train, "label", "train")
    found = {str(label) for label in train["label"]}
    numbers = {str(i) for i in range(len(task.classes))}
    known = found <= set(task.classes) or found <= numbers
    return task.classes if known else tuple(sorted(found))


def _column(rows, wanted: str, split: str) -> str:
    for name in COLUMNS[wanted]:
        if name in rows.column_names:
            return name
    raise ValueError(
        f"--data: {split} needs a column {' or '.join(COLUMNS[wanted])}; it has"
        f" {', '.join(rows.column_names)}"
    )


def _canonical(task: Task, rows, classes: tuple[str, ...], split: str):
    """The rows with the columns of the registry, in its names."""
    if len(rows) == 0:
        raise ValueError(f"--data: the {split} split is empty")
    if task.causal:
        return instruct_rows.canonical(rows, split)
    if task.languages and "translation" in rows.column_names:
        first, second = task.languages
        return rows.map(
            lambda row: {"source": row["translation"][first], "target": row["translation"][second]},
            remove_columns=rows.column_names,
        )
    if task.generates:
        names = {_column(rows, name, split): name for name in ("source", "target")}
    else:
        names = {_column(rows, name, split): name for name in ("text", "label")}
        pair = next((name for name in COLUMNS["pair"] if name in rows.column_names), None)
        names |= {pair: "pair"} if pair else {}
    rows = rows.select_columns(list(names))
    check_text(rows, [old for old, new in names.items() if new != "label"], split)
    rows = rows.rename_columns({old: new for old, new in names.items() if old != new})
    return _labelled(rows, classes, split) if "label" in rows.column_names else rows


def _labelled(rows, classes: tuple[str, ...], split: str):
    numbers = {name: i for i, name in enumerate(classes)}
    if not any(name.isdigit() for name in classes):
        numbers |= {str(i): i for i in range(len(classes))}
    found = {str(label) for label in rows["label"]}
    unknown = sorted(found - numbers.keys())
    if unknown and (unknown != ["-1"] or split == "train"):
        raise ValueError(f"--data: label {unknown[0]!r} of {split} is none of {', '.join(classes)}")
    if unknown:  # the hub's unlabelled test rows
        rows = rows.filter(lambda row: str(row["label"]) in numbers)
    labels = [numbers[str(label)] for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", labels)
