"""What a model and a folder of rows are: the task they fit, the rows' form and lengths."""

from dataclasses import dataclass
from pathlib import Path

from . import recipe as recipes
from .data import load
from .instruct.rows import form_of
from .instruct.tokens import tokenised as instruct_tokens
from .kinds import OTHER, fitting_task, kind_of
from .loading import check_here, load_config, load_tokenizer, positions_of
from .pretrained import from_pretrained
from .recipe import Recipe
from .registry import task_of
from .tokens import tokenised

SAMPLE = 2_000  # rows whose lengths are counted
WHOLE = 1_000_000  # tokens: longer than any row
STEP = 64  # a length is a multiple of it
UPDATES = 10  # of an epoch, at least, where there are rows for it
LONGEST, PACKED = 4_096, 1_024  # tokens: what a row gets at most, and a packed row at least


@dataclass(frozen=True)
class Look:
    """``recipe``: the task's, with the lengths that the rows need; ``form``: the columns;
    ``rows`` of train and validation; ``lengths``: sorted tokens of the rows that were counted,
    ``targets`` of a seq2seq task's targets; ``config`` of the model."""

    recipe: Recipe
    form: str
    rows: tuple[int, int]
    lengths: list[int]
    targets: list[int]
    config: object

    def share(self, part: float) -> int:
        """The length that this part of the rows does not exceed."""
        return self.lengths[min(len(self.lengths) - 1, int(part * len(self.lengths)))]


def look(model: str, folder: Path, method: str | None = None) -> Look:
    """Read the model's config and tokenizer and the rows of a folder.

    Raises OSError when the model cannot be loaded, ValueError when no task fits it, and what
    ``data.load`` raises when the rows do not fit the task.
    """
    start = _start(model, folder, method)
    check_here(start)
    config, task = load_config(start), task_of(start.task)
    data = load(task, folder)
    tokenizer = load_tokenizer(start, config)
    positions = positions_of(config, tokenizer)
    sample = data.train.select(range(min(SAMPLE, len(data.train))))
    if task.causal:
        lengths = sorted(instruct_tokens(sample, tokenizer, WHOLE, model, "train")["length"])
        targets, form = [], form_of(data.train.column_names)
    else:
        found = tokenised(sample, task, tokenizer, WHOLE, WHOLE)
        lengths = sorted(map(len, found["input_ids"]))
        targets = sorted(map(len, found["labels"])) if task.translates else []
        form = " and ".join(data.train.column_names)
    found = start.replace(**_lengths(start, lengths, targets, positions))
    rows = len(data.train), len(data.validation)
    found = found.replace(accumulation=_accumulation(found, lengths, rows[0]))
    return Look(found, form, rows, lengths, targets, config)


def _start(model: str, folder: Path, method: str | None) -> Recipe:
    """The recipe of the task that fits a model, with the shortest lengths."""
    from transformers import AutoConfig

    kind = kind_of(from_pretrained(AutoConfig, model))
    if kind == OTHER:
        raise ValueError(f"{model} is a {kind}: no task of pelt-fast train fits it")
    name = fitting_task(kind)
    found = recipes.load(f"{name}-{method}" if method else name)
    shortest = dict(max_length=1, max_target=1, max_generated=1)
    return found.replace(name=folder.name, model=model, data=str(folder), **shortest)


def _lengths(start: Recipe, lengths: list[int], targets: list[int], positions: int | None) -> dict:
    """max_length and max_target: the longest row, rounded up, in what the model has room for; the
    task's max_generated, in the same."""
    room = min(positions or LONGEST, LONGEST)
    longest = _rounded(lengths[-1])
    if task_of(start.task).causal and start.packing:
        longest = max(longest, PACKED)
    changes = dict(max_length=min(longest, room))
    if targets:
        changes["max_target"] = min(_rounded(targets[-1]), room)
    if task_of(start.task).generates:
        changes["max_generated"] = min(recipes.load(start.task).max_generated, room)
    return changes


def _accumulation(recipe: Recipe, lengths: list[int], rows: int) -> int:
    """The recipe's accumulation, or less: few rows would be an epoch of a step or two."""
    tokens = rows * sum(lengths) / len(lengths)
    if task_of(recipe.task).causal and recipe.packing:
        batches = tokens / (recipe.max_length * recipe.batch_size)
    elif recipe.batch_tokens:
        batches = tokens / recipe.batch_tokens
    else:
        batches = rows / recipe.batch_size
    return max(1, min(recipe.accumulation, int(batches / UPDATES)))


def _rounded(length: int) -> int:
    return -(-length // STEP) * STEP
