"""A few answers of the model at each evaluation, written beside the log."""

from pathlib import Path

import torch

from ..loading import positions_of
from ..meter import append_line
from .tokens import IGNORED

FILE = "generations.jsonl"
ROWS = 4
BEGINNING = 16  # tokens of a plain text that it is to go on from


def prompts(rows, count: int = ROWS) -> list[tuple[list[int], list[int]]]:
    """The ids up to the first learned token, and those that were to come, of the first rows."""
    found = []
    for row in rows.select(range(min(count, len(rows)))):
        ids, labels = row["input_ids"], row["labels"]
        first = next(i for i, label in enumerate(labels) if label != IGNORED)
        if first < 2:  # a plain text, perhaps behind the token that begins every text
            first = max(1, min(BEGINNING, len(ids) // 2))
        last = next((i for i in range(first, len(ids)) if labels[i] == IGNORED), len(ids))
        found.append((ids[:first], ids[first:last]))
    return found


@torch.no_grad()
def answer(model, tokenizer, ids: list[int], max_new_tokens: int) -> str:
    """What the model says after a prompt, greedily. A prompt that leaves too few positions for the
    answer loses its beginning."""
    device = next(model.parameters()).device
    positions = positions_of(model.config, tokenizer)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - 1)
        ids = ids[-(positions - max_new_tokens) :]
    given = torch.tensor([ids], device=device)
    out = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=max_new_tokens,
        do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends(model, tokenizer),
    )  # fmt: skip
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def ends(model, tokenizer) -> list[int] | None:
    """The ids that end an answer: the model's and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in (*own, tokenizer.eos_token_id) if i is not None}) or None


def callback(rows, tokenizer, folder: Path, max_new_tokens: int):
    """A callback for the Trainer. Every process generates, so that a sharded model can; the first
    writes step, prompt, what was wanted, and what was generated."""
    from transformers import TrainerCallback

    chosen = prompts(rows)

    class Generations(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **kwargs):
            training = model.training
            model.eval()
            for ids, wanted in chosen:
                line = {"step": state.global_step, "prompt": tokenizer.decode(ids),
                        "wanted": tokenizer.decode(wanted, skip_special_tokens=True),
                        "generated": answer(model, tokenizer, ids, max_new_tokens)}  # fmt: skip
                if state.is_world_process_zero:
                    append_line(folder / FILE, line)
            model.train(training)

    return Generations()
