"""A conversation as one text under the tokenizer's chat template, and which of it is learned.

What a model is to say stands between the template's text up to an assistant's message (with its
prompt for an answer) and its text up to the end of that message, so the end-of-turn token is
learned too. A message that the template writes otherwise once a later one follows (it drops the
reasoning of earlier answers) is not learned: the model never says it in that form.
"""

import itertools

from ..say import first_line
from .rows import ASSISTANT


class Refused(ValueError):
    """The chat template refuses messages."""


Span = tuple[int, int]  # first character, and the one after the last


def check_template(tokenizer, model: str) -> None:
    """ValueError when the tokenizer has no chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer of {model} has no chat template, which rows of messages need: set"
            " tokenizer.chat_template and save it, or write prompt and completion as text"
        )


def rendered(tokenizer, messages: list[dict], answer: bool = False) -> str:
    """The text of messages; ``answer`` ends it where an assistant's message begins."""
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # a template raises errors of its own
        raise Refused(first_line(error)) from None


def conversation(tokenizer, messages: list[dict], given: int = 0) -> tuple[str, list[Span], int]:
    """The text of a conversation; the spans of it that are learned, which are the assistant's
    messages behind the first ``given``; and how many of those are not learned."""
    text = rendered(tokenizer, messages)
    answers = [i for i, m in enumerate(messages) if m["role"] == ASSISTANT and i >= given]
    spans = [_span(tokenizer, messages, place, text) for place in answers]
    found = [span for span in spans if span is not None]
    return text, found, len(spans) - len(found)


def _span(tokenizer, messages: list[dict], place: int, text: str) -> Span | None:
    """Where message ``place`` stands in the text; None where the template writes it otherwise."""
    before, given, asked = messages[:place], "", ""
    if before:
        given, asked = rendered(tokenizer, before), rendered(tokenizer, before, answer=True)
    known, start = _shared(given, text), _shared(asked, text)
    if start < len(asked):  # the text may lack what asks for a reasoning, but nothing of a message
        if known < len(given):
            return None
        start = max(start, known)
    end = _shared(rendered(tokenizer, messages[: place + 1]), text)  # which may add an end token
    said = _bare(messages[place]["content"]) in _bare(text[known:end])
    return (start, end) if said and start < end else None


def _bare(text: str) -> str:
    """A text without white space: a template may lay out a reasoning anew."""
    return "".join(text.split())


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    if second.startswith(first):
        return len(first)
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second))
    return sum(1 for _ in pairs)
