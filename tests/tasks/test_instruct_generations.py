"""The generations that an evaluation writes: their prompts, and what fits into the model."""

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from pelt_fast.tasks.instruct.generations import BEGINNING, answer, prompts
from pelt_fast.tasks.instruct.tokens import tokenised
from tests.tasks import chat


def test_a_plain_text_is_gone_on_from_its_beginning_with_and_without_a_first_token():
    rows = Dataset.from_list([{"text": "a" * 50}, {"text": "abcdef"}])
    for own in (chat.tokenizer(), begun(chat.tokenizer())):
        found = tokenised(rows, own, 99, "MODEL", "train")
        (long, wanted), (short, _) = prompts(found)
        assert len(long) == BEGINNING and long + wanted == found[0]["input_ids"]
        assert len(short) == len(found[1]["input_ids"]) // 2 > 1


def begun(own):
    """The tokenizer, which now begins every text with its first token."""
    from tokenizers.processors import TemplateProcessing

    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    assert own("a")["input_ids"][0] == own.bos_token_id
    return own


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end():
    torch.manual_seed(0)
    own, positions = chat.tokenizer(), 24
    config = GPT2Config(vocab_size=len(own), n_positions=positions, n_embd=32, n_layer=2, n_head=4,
                        bos_token_id=0, eos_token_id=None)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    ids = own("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    assert answer(model, own, ids, 8) == answer(model, own, ids[-(positions - 8) :], 8)
    assert answer(model, own, ids, 99) == answer(model, own, ids[-1:], positions - 1)
