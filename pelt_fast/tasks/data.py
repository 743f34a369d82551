"""Text classification data: a local folder, or GLUE by name through ``datasets``.

A folder holds ``train`` and ``validation`` (or ``dev``, ``test``) as .jsonl, .json, .csv or .tsv,
plain or .gz, with a text column (text, sentence or premise), perhaps a second (text_pair,
sentence2 or hypothesis), and ``label``, a number or a name.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TASKS = ("sst2", "mnli")
FIRST = ("text", "sentence", "premise", "sentence1")
SECOND = ("text_pair", "sentence2", "hypothesis")
_READERS = {".jsonl": ("json", {}), ".json": ("json", {}), ".csv": ("csv", {}),
            ".tsv": ("csv", {"delimiter": "\t", "quoting": 3})}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Texts, second texts (None when there are none) and labels of one split."""

    texts: Sequence[str]
    pairs: Sequence[str] | None
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ClassificationData:
    """A training and an evaluation split, and the classes by name."""

    train: Split
    evaluation: Split
    classes: tuple[str, ...]


def _datasets():
    try:
        import datasets
    except ImportError:
        raise RuntimeError("reading data needs the extra: pip install 'pelt_fast[train]'") from None
    datasets.disable_progress_bars()
    return datasets


def from_folder(folder: str | Path) -> ClassificationData:
    """Read a local folder.

    Raises FileNotFoundError when a split is missing, ValueError when a column is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: {folder} is not a folder")
    train = _read(_find(folder, ("train",)))
    evaluation = _read(_find(folder, ("validation", "dev", "test")))
    return _assemble(train, evaluation, [str(name) for name in sorted({*map(str, train["label"])})])


def _find(folder: Path, stems: Sequence[str]) -> Path:
    for stem in stems:
        for suffix in _READERS:
            for ending in (suffix, f"{suffix}.gz"):
                if (folder / f"{stem}{ending}").is_file():
                    return folder / f"{stem}{ending}"
    wanted = ", ".join(f"{stems[0]}{suffix}" for suffix in _READERS)
    raise FileNotFoundError(f"--data: {folder} holds none of {wanted} (or .gz of them)")


def _read(path: Path):
    kind, options = _READERS[path.name.removesuffix(".gz")[len(path.name.split(".")[0]) :]]
    table = _datasets().load_dataset(kind, data_files=str(path), split="train", **options)
    if "label" not in table.column_names or not any(c in table.column_names for c in FIRST):
        raise ValueError(
            f"--data: {path.name} needs a column label and one of {', '.join(FIRST)};"
            f" it has {', '.join(table.column_names)}"
        )
    return table


def from_glue(task: str) -> ClassificationData:
    """``sst2`` or ``mnli`` (matched) from the hub.

    Raises ValueError for another name, ConnectionError when the hub cannot be reached and
    nothing is cached; the message names the local way.
    """
    if task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {task!r}")
    evaluation = "validation" if task == "sst2" else "validation_matched"
    datasets = _datasets()
    # the hub's client would tell of every retry; what matters is said once below
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    try:
        tables = datasets.load_dataset("nyu-mll/glue", task)
    except Exception as error:
        raise ConnectionError(
            f"--task {task}: the hub cannot be reached ({type(error).__name__}); give the files"
            " yourself with --data FOLDER (train.tsv and dev.tsv with columns sentence and label)"
        ) from None
    names = tables["train"].features["label"].names
    return _assemble(tables["train"], tables[evaluation], names)


def _assemble(train, evaluation, classes: list[str]) -> ClassificationData:
    return ClassificationData(_split(train, classes), _split(evaluation, classes), tuple(classes))


def _split(table, classes: list[str]) -> Split:
    column = next(name for name in FIRST if name in table.column_names)
    second = next((name for name in SECOND if name in table.column_names), None)
    raw = table["label"]
    if all(isinstance(label, int) and 0 <= label < len(classes) for label in raw):
        labels = list(raw)
    else:
        known = {name: i for i, name in enumerate(classes)}
        unknown = {str(label) for label in raw} - known.keys()
        if unknown:
            raise ValueError(f"--data: label {sorted(unknown)[0]!r} is in no training row")
        labels = [known[str(label)] for label in raw]
    return Split(list(table[column]), list(table[second]) if second else None, labels)
