"""A tiny causal model whose tokenizer has one token a byte and a chat template, and its rows."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.small import llama

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POSITIONS = 160


def tokenizer(template: str | None = TEMPLATE, pad: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}  # fmt: skip
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    found = PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        **({"pad_token": "<pad>"} if pad else {}),
    )  # fmt: skip
    found.chat_template = template
    return found


def model_folder(folder: Path, **changes) -> str:
    torch.manual_seed(0)
    own = tokenizer(**changes)
    size = dict(
        vocab_size=len(own), max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=2
    )
    llama(**size).save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)


PAIRS = [("say a", "aaaa"), ("say b", "bbbb"), ("say c", "cccc"), ("say d", "dddd")]


def said(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = {
    "messages": [{"messages": said(*pair)} for pair in PAIRS],
    "completion": [{"prompt": f"{question}: ", "completion": answer} for question, answer in PAIRS],
    "text": [{"text": f"{question}: {answer}"} for question, answer in PAIRS],
    "turns": [{"prompt": said(question, answer)[:1], "completion": said(question, answer)[1:]}
              for question, answer in PAIRS],
}  # fmt: skip


def write(folder: Path, rows: list[dict], splits=("train", "validation"), repeat: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        lines = [json.dumps(row) for row in rows * (repeat if split == "train" else 1)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
