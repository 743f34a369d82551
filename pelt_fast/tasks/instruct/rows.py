"""The rows of the task instruct: which form they have, and what is wrong with one.

A row is a conversation (``messages``, each with a role and a content), a prompt with its completion
(texts, or messages), or plain ``text``. Where there are completions the loss is on them alone; in a
conversation these are the assistant's messages.
"""

from ..say import say

FORMS = {"messages": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
ASSISTANT = "assistant"
NUMBER = "number"  # of a row in the file of the train rows, where it was held out or shuffled
SHARE, MOST = 0.05, 500  # of the train rows that are held out where there is no other split


def form_of(columns: list[str], split: str = "train") -> str:
    """The form of rows with these columns, a key of FORMS. Raises ValueError when they have none;
    it says which columns are there."""
    for form, needed in FORMS.items():
        if set(needed) <= set(columns):
            return form
    wanted = ", or ".join(" and ".join(needed) for needed in FORMS.values())
    raise ValueError(f"--data: {split} needs the columns {wanted}; it has {', '.join(columns)}")


def canonical(rows, split: str):
    """The rows with the columns of their form alone; ValueError for rows of no form."""
    return rows.select_columns(list(FORMS[form_of(rows.column_names, split)]))


def problem_of(row: dict, form: str) -> str | None:
    """What is wrong with a row, or None."""
    if form == "messages":
        return _of_messages(row["messages"], "messages") or _without_answer(row["messages"])
    if form == "text":
        return _of_text(row["text"], "text")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        return "has a prompt of text and a completion of messages, or the other way round"
    if isinstance(prompt, list):
        found = _of_messages(prompt, "prompt") or _of_messages(completion, "completion")
        return found or _without_answer(completion)
    if not isinstance(prompt, str):
        return f"has a prompt of {_kind(prompt)}: text is needed"
    return _of_text(completion, "completion")


def _of_text(value, name: str) -> str | None:
    if not isinstance(value, str):
        return f"has a {name} of {_kind(value)}: text is needed"
    return None if value.strip() else f"has an empty {name}"


def _of_messages(value, name: str) -> str | None:
    if not isinstance(value, list):
        return f"has {name} of {_kind(value)}: a list of messages is needed"
    if not value:
        return f"has no {name}"
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"has a message without role and content in {name}"
        if not isinstance(message["content"], str):
            return f"has a content of {_kind(message['content'])} in {name}: text is needed"
    return None


def _without_answer(messages: list[dict]) -> str | None:
    answers = [message["content"] for message in messages if message["role"] == ASSISTANT]
    if not answers:
        return f"has no message of the role {ASSISTANT!r}: nothing is learned from it"
    return None if all(map(str.strip, answers)) else f"has an empty {ASSISTANT} message"


def _kind(value) -> str:
    return "nothing" if value is None else f"type {type(value).__name__}"


def prompts_and_answers(row: dict) -> tuple[list[dict], int]:
    """The messages of a row, and how many of them are the prompt."""
    if "messages" in row:
        return row["messages"], 0
    return [*row["prompt"], *row["completion"]], len(row["prompt"])


def held_out(train) -> dict:
    """A train and a validation split of rows that came without a validation split. Each row keeps
    its number in the file."""
    if len(train) < 2:
        raise ValueError("--data: train has one row, and there is no validation split")
    count = min(MOST, max(1, round(SHARE * len(train))))
    say(f"there is no validation split: {count:,} of {len(train):,} train rows are held out")
    numbered = train.add_column(NUMBER, range(1, len(train) + 1))
    parts = numbered.train_test_split(test_size=count, seed=0)
    return {"train": parts["train"], "validation": parts["test"]}
