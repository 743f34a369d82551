"""The chat templates of released models, as TRL carries them: the answers are learned, and nothing
else that was said."""

from pathlib import Path

import pytest

from pelt_fast.tasks.instruct.chat import Refused, conversation
from tests.tasks import chat

trl = pytest.importorskip("trl")
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TURNS = [*chat.said("one?", "first"), *chat.said("two?", "second")]
SYSTEM = {"role": "system", "content": "be brief"}
# they want a list of parts for a content
PARTS = ("idefics3", "llava", "smolvlm")
# they write an earlier answer with, or without, a reasoning by what follows
HINDSIGHT = ("qwen3.jinja", "qwen3_5_nothink.jinja", "qwen3_5_think.jinja", "qwen3_6.jinja")


@pytest.mark.skipif(not TEMPLATES, reason="this TRL carries no templates")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("system", [False, True], ids=["", "system"])
def test_answers_are_learned_and_questions_are_not(path, system):
    messages = [SYSTEM, *TURNS] if system else TURNS
    try:
        text, spans, skipped = conversation(chat.tokenizer(path.read_text()), messages)
    except Refused:
        assert path.name.startswith(PARTS) or (system and path.name.startswith("gemma"))
        return
    learned = [text[a:b] for a, b in spans]
    assert not any(question in "".join(learned) for question in ("one?", "two?", "brief"))
    if path.name.startswith(PARTS):
        assert not learned and skipped == 2
        return
    wanted = ["second"] if path.name in HINDSIGHT else ["first", "second"]
    assert len(learned) == len(wanted) and skipped == 2 - len(wanted)
    assert all(answer in said for answer, said in zip(wanted, learned))


@pytest.mark.skipif(not TEMPLATES, reason="this TRL carries no templates")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_reasoning_is_learned_with_its_answer(path):
    if path.name.startswith(PARTS):
        pytest.skip("it wants a list of parts")
    messages = [*TURNS[:3], {"role": "assistant", "content": "<think>hm</think>second"}]
    text, spans, skipped = conversation(chat.tokenizer(path.read_text()), messages)
    if "hm" not in text:  # the template drops it, so that the answer is not the row's
        assert skipped == 1
        return
    last = text[slice(*spans[-1])]
    assert "hm" in last and "second" in last and "two?" not in last
