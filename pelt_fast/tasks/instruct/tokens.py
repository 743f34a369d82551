"""Rows of the task instruct as token ids and labels, and what was cut, said once."""

from ..recipe import Recipe
from ..say import say
from ..tokens import LENGTH
from .chat import Refused, check_template, conversation
from .rows import NUMBER, form_of, problem_of, prompts_and_answers

IGNORED = -100
WHOLE = "whole"  # tokens of a row before it is cut
LEARNED = "learned"  # tokens of a row that the loss is on
SKIPPED = "skipped"  # answers of a row that the template writes otherwise


def of_splits(splits: dict, recipe: Recipe, tokenizer) -> dict:
    """Tokenised rows by split; a split that is another one too is made once."""
    made: dict[int, object] = {}
    for name, rows in splits.items():
        if id(rows) not in made:
            made[id(rows)] = tokenised(rows, tokenizer, recipe.max_length, recipe.model, name)
    return {name: made[id(rows)] for name, rows in splits.items()}


def tokenised(rows, tokenizer, max_length: int, model: str, split: str):
    """Each row as input_ids, labels (IGNORED where nothing is learned) and its length.

    A row longer than ``max_length`` loses its end, which is said; one that has nothing left to
    learn is left out. Raises ValueError for messages without a chat template, the first row that
    cannot be learned or that the template refuses, a tokenizer without offsets, and when nothing is
    left.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {model} is slow: it cannot tell where a token stands")
    form = form_of(rows.column_names, split)
    if form == "messages" or isinstance(rows[0].get("prompt"), list):
        check_template(tokenizer, model)

    def encode(row: dict, number: int) -> dict:
        where = f"row {row[NUMBER]} of train" if NUMBER in row else f"row {number + 1} of {split}"
        problem = problem_of(row, form)
        if problem:
            raise ValueError(f"--data: {where} {problem}")
        try:
            ids, labels, skipped = _encoded(row, tokenizer)
        except Refused as error:
            raise ValueError(f"--data: the chat template refuses {where}: {error}") from None
        labels = labels[:max_length]
        cut = {"input_ids": ids[:max_length], "labels": labels, LENGTH: len(labels)}
        learned = sum(label != IGNORED for label in labels[1:])  # nothing predicts the first
        return {**cut, WHOLE: len(ids), LEARNED: learned, SKIPPED: skipped}

    found = rows.map(encode, with_indices=True, remove_columns=rows.column_names)
    return _kept(found, max_length, split).remove_columns([WHOLE, LEARNED, SKIPPED])


def _encoded(row: dict, tokenizer) -> tuple[list[int], list[int], int]:
    """Ids and labels of a whole row, and how many answers are not learned. The end token is."""
    chat, skipped = "text" not in row and not isinstance(row.get("prompt"), str), 0
    if chat:
        text, spans, skipped = conversation(tokenizer, *prompts_and_answers(row))
    elif "text" in row:
        text, spans = row["text"], [(0, len(row["text"]))]
    else:
        text = row["prompt"] + row["completion"]
        spans = [(len(row["prompt"]), len(text))]
    found = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    ids = found["input_ids"]
    learned = [any(a < end <= b and start < end for a, b in spans)
               for start, end in found["offset_mapping"]]  # fmt: skip
    if not chat and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, learned = [*ids, tokenizer.eos_token_id], [*learned, True]
        learned[-1] = True
    return ids, [i if said else IGNORED for i, said in zip(ids, learned)], skipped


def _kept(rows, max_length: int, split: str):
    """The rows with something to learn. What was cut, left out and not learned is said."""
    longer = [length for length in rows[WHOLE] if length > max_length]
    kept = [i for i, count in enumerate(rows[LEARNED]) if count]
    skipped = sum(rows[SKIPPED])
    if not kept and skipped:
        raise ValueError(
            f"--data: the chat template writes no answer of {split} as it stands in the row"
        )
    if not kept:
        raise ValueError(
            f"--data: no row of {split} has anything to learn within max_length={max_length}"
        )
    if longer:
        say(f"{split}: {len(longer):,} of {len(rows):,} rows are longer than max_length="
            f"{max_length:,} and were cut; the longest has {max(longer):,} tokens")  # fmt: skip
    if len(kept) < len(rows):
        say(f"{split}: {len(rows) - len(kept):,} of {len(rows):,} rows have nothing left to learn"
            " and were left out")  # fmt: skip
    if skipped:
        say(f"{split}: {skipped:,} answers are not learned: the chat template writes them otherwise"
            " once another message follows")  # fmt: skip
    return rows.select(kept)
