"""Which tokens of a row are learned, under chat templates of several kinds."""

import pytest
from datasets import Dataset

from pelt_fast.tasks.instruct.rows import canonical, form_of, held_out
from pelt_fast.tasks.instruct.tokens import IGNORED, tokenised
from tests.tasks import chat

# as Qwen's: the reasoning of earlier answers is dropped, and asking adds what the text may not have
REASONING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' and loop.last %}"
    "(think){% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>(think)(more){% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate\nand more') }}"
TURNS = [*chat.said("one", "first"), *chat.said("two", "second")]


def learned(rows: list[dict], own, max_length: int = 999) -> list[list[str]]:
    """The learned texts of each row, in their order."""
    found = tokenised(Dataset.from_list(rows), own, max_length, "MODEL", "train")
    texts = []
    for ids, labels in zip(found["input_ids"], found["labels"]):
        assert all(label in (i, IGNORED) for i, label in zip(ids, labels))
        parts = "".join(own.convert_ids_to_tokens(y) if y != IGNORED else "\n" for y in labels)
        texts.append([part for part in parts.split("\n") if part])
    return texts


def test_every_answer_of_a_conversation_is_learned_with_its_end():
    assert learned([{"messages": TURNS}], chat.tokenizer()) == [["first<|end|>", "second<|end|>"]]


def test_a_completion_of_messages_is_learned_alone():
    row = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    assert learned([row], chat.tokenizer()) == [["second<|end|>"]]


def test_a_completion_of_text_is_learned_with_the_end_token():
    rows = [{"prompt": "ask:", "completion": "yes"}, {"prompt": "", "completion": "no"}]
    assert learned(rows, chat.tokenizer()) == [["yes</s>"], ["no</s>"]]


def test_a_plain_text_is_learned_whole():
    assert learned([{"text": "all"}], chat.tokenizer()) == [["all</s>"]]


def test_an_end_that_the_tokenizer_adds_is_not_doubled():
    assert learned([{"text": "all</s>"}], chat.tokenizer()) == [["all</s>"]]


def test_letters_of_several_bytes_belong_to_the_side_that_they_stand_on():
    row = {"prompt": "é", "completion": "ü"}
    (text,) = learned([row], chat.tokenizer())
    assert text == ["Ã¼</s>"]  # the two bytes of ü, as a byte-level tokenizer spells them


def test_an_answer_that_the_template_writes_otherwise_later_is_not_learned_and_that_is_said(capsys):
    own = chat.tokenizer(REASONING)
    assert learned([{"messages": TURNS}], own) == [["second<|end|>"]]
    assert "train: 1 answers are not learned" in capsys.readouterr().err


def test_a_row_is_cut_at_its_end():
    rows = [{"prompt": "ab", "completion": "cdefgh"}]
    assert learned(rows, chat.tokenizer(), max_length=5) == [["cde"]]


@pytest.mark.parametrize("rows, template, message", [
    ([{"messages": TURNS}], None, "the tokenizer of MODEL has no chat template"),
    ([{"prompt": TURNS[:1], "completion": TURNS[1:2]}], None, "has no chat template"),
    ([{"messages": TURNS}], REFUSING, "refuses row 1 of train: roles must alternate$"),
    ([{"prompt": "a" * 2000, "completion": "b"}], None, "no row of train has anything to learn"),
])  # fmt: skip
def test_what_cannot_be_learned_is_refused(rows, template, message):
    with pytest.raises(ValueError, match=message):
        learned(rows, chat.tokenizer(template))


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "completion": " "}, "row 1 of train has an empty completion"),
    ({"prompt": "a", "completion": None}, "has a completion of nothing: text is needed"),
    ({"prompt": None, "completion": "a"}, "has a prompt of nothing"),
    ({"prompt": TURNS[:1], "completion": "a"}, "a prompt of text and a completion of messages"),
    ({"messages": []}, "has no messages"),
    ({"messages": "hello"}, "has messages of type str: a list of messages is needed"),
    ({"messages": TURNS[:1]}, "has no message of the role 'assistant'"),
    ({"messages": chat.said("a", " ")}, "has an empty assistant message"),
    ({"messages": [{"role": "assistant", "text": "a"}]}, "without role and content"),
    ({"messages": [{"role": "assistant", "content": None}]}, "has a content of nothing"),
    ({"text": ""}, "has an empty text"),
    ({"words": "a"}, "needs the columns messages, or prompt and completion, or text; it has words"),
])  # fmt: skip
def test_a_row_that_is_wrong_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        learned([row], chat.tokenizer())


def test_the_columns_of_the_form_are_kept_alone():
    rows = Dataset.from_list([{"id": 7, "text": "a"}])
    assert canonical(rows, "train").column_names == ["text"]


def test_a_held_out_row_that_is_wrong_is_one_of_the_files_train():
    rows = Dataset.from_list([{"text": str(i)} for i in range(40)])
    place = held_out(rows)["validation"][0]["number"]
    wrong = [{"text": "" if i + 1 == place else str(i)} for i in range(40)]
    part = held_out(Dataset.from_list(wrong))["validation"]
    with pytest.raises(ValueError, match=f"row {place} of train has an empty text"):
        tokenised(part, chat.tokenizer(), 99, "MODEL", "validation")


def test_the_richest_form_of_the_columns_is_taken():
    assert form_of(["text", "messages"]) == "messages"
    assert form_of(["text", "prompt", "completion"]) == "completion"


def test_rows_are_held_out_once():
    rows = Dataset.from_list([{"text": str(i)} for i in range(40)])
    parts = held_out(rows)
    assert sorted(map(len, parts.values())) == [2, 38]
    assert set(parts["train"]["text"]) | set(parts["validation"]["text"]) == set(rows["text"])
    with pytest.raises(ValueError, match="train has one row"):
        held_out(rows.select([0]))
