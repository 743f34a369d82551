"""A training run that may be killed at any moment: ``python -m tests.models.long_run FOLDER STEPS``
goes on from the newest whole checkpoint and writes a line a step, and memory now and then."""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainingArguments

import pelt_fast
from pelt_fast.integrations.trainer import PeltTrainer, last_checkpoint
from tests.small import PAD, VOCABULARY, bart

ROWS, EVERY = 512, 25


class Ragged(torch.utils.data.Dataset):
    """Token ids of 4 to 24 tokens."""

    def __init__(self):
        draw = torch.Generator().manual_seed(5)
        lengths = torch.randint(4, 25, (ROWS,), generator=draw).tolist()
        self.rows = [torch.randint(4, VOCABULARY, (n,), generator=draw) for n in lengths]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.rows[i]


def padded(rows: list[torch.Tensor]) -> dict:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    return dict(input_ids=ids, attention_mask=(ids != PAD).long(),
                labels=ids.masked_fill(ids == PAD, -100))  # fmt: skip


class Journal(TrainerCallback):
    """A line a step, on disk before the next step begins."""

    def __init__(self, path: Path):
        self.file = path.open("a", buffering=1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            entry = {"step": state.global_step, "loss": logs["loss"], "memory": resident()}
            self.file.write(json.dumps(entry) + "\n")


def resident() -> int:
    """KiB this process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    return 0


def main(folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = pelt_fast.inject(bart(dropout=0.1), pelt_fast.methods()["mam"].replace(size=5))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, learning_rate=5e-3,
        save_strategy="steps", save_steps=EVERY, save_total_limit=3, logging_steps=1, report_to=[],
        seed=3, disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True, logging_nan_inf_filter=False,
    )  # fmt: skip
    trainer = PeltTrainer(
        model=model, args=arguments, train_dataset=Ragged(), data_collator=padded,
        callbacks=[Journal(folder / "journal.jsonl")],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last_checkpoint(folder) is not None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
