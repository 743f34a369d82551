"""Fine-tune a sequence classifier with transformers' Trainer, and measure it."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from .data import ClassificationData, Split
from .pretrained import from_pretrained

# for a few epochs on little data, each the best of two to four tried on the demo's task (mam and
# lora_ffn by analogy); the paper trains ten epochs at 1e-4 (Table 8). Wide bottlenecks want less.
LEARNING_RATES = {
    "full": 2e-4,
    "linear_probe": 1e-2,
    "lora": 4e-3,
    "lora_ffn": 5e-4,
    "mam": 3e-4,
    "mam_glue": 3e-3,
    "scaled_parallel_adapter": 3e-4,
}
DEFAULT_LEARNING_RATE = 1e-3
# Adam moves each of the 800 inputs of a prefix MLP's output alike, so its keys and values move
# hundreds of times the rate in a step: at the adapters' own rate they diverge
PREFIX_SHARE = 0.2


@dataclass(frozen=True)
class Recipe:
    """Settings of one run."""

    epochs: float = 2.0
    batch_size: int = 32
    learning_rate: float | None = None  # None: by method
    max_length: int = 64
    seed: int = 42

    def rate(self, method: str) -> float:
        """The learning rate for ``method``."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES.get(method, DEFAULT_LEARNING_RATE)


class TokenizedSplit(Dataset):
    """A split as token ids, padded batch by batch."""

    def __init__(self, split: Split, tokenizer, max_length: int):
        self.encoded = tokenizer(
            list(split.texts), None if split.pairs is None else list(split.pairs), truncation=True,
            max_length=max_length,
        )  # fmt: skip
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        row = {name: values[index] for name, values in self.encoded.items()}
        return {**row, "labels": int(self.labels[index])}


def by_length(split: Split) -> Split:
    """The rows from short to long, so that batches in order are padded little."""
    order = sorted(range(len(split)), key=lambda i: len(split.texts[i]))
    pairs = None if split.pairs is None else [split.pairs[i] for i in order]
    return Split([split.texts[i] for i in order], pairs, [split.labels[i] for i in order])


def load_classifier(path: str | Path, classes: int):
    """Model and tokenizer of a local folder or a hub name."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, path)
    model = from_pretrained(AutoModelForSequenceClassification, path, num_labels=classes)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def parameter_groups(model: nn.Module, rate: float) -> list[dict]:
    """What trains, with its learning rate: a prefix's reparameterisation gets its own share."""
    groups = {rate: [], rate * PREFIX_SHARE: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = any(step.endswith("_prefix") for step in name.split("."))
            groups[rate * PREFIX_SHARE if slow else rate].append(parameter)
    return [{"params": found, "lr": lr} for lr, found in groups.items() if found]


def fit(
    model: nn.Module, tokenizer, data: ClassificationData, recipe: Recipe, method: str,
    output: Path, quiet: bool = False,
) -> float:  # fmt: skip
    """Train in place; returns the accuracy on the evaluation split, in percent."""
    try:
        from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

        grouping = {"train_sampling_strategy": "group_by_length"}
        if not grouping.keys() & {field.name for field in fields(TrainingArguments)}:
            grouping = {"group_by_length": True}  # its name in early transformers 5
        arguments = TrainingArguments(
            output_dir=str(output), num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size, per_device_eval_batch_size=128,
            learning_rate=recipe.rate(method), warmup_steps=0.06, weight_decay=0.0,
            lr_scheduler_type="linear", seed=recipe.seed, save_strategy="no", report_to=[],
            logging_strategy="no", disable_tqdm=quiet or not sys.stderr.isatty(),
            dataloader_pin_memory=torch.cuda.is_available(), **grouping,
        )  # fmt: skip
    except ImportError as error:
        raise RuntimeError(
            f"training needs the extra: pip install 'pelt_fast[train]' ({error})"
        ) from None
    groups = parameter_groups(model, recipe.rate(method))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trainer = Trainer(
        model=model, args=arguments, data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(optimizer, None),
        train_dataset=TokenizedSplit(data.train, tokenizer, recipe.max_length),
        eval_dataset=TokenizedSplit(by_length(data.evaluation), tokenizer, recipe.max_length),
        compute_metrics=_accuracy,
    )  # fmt: skip
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


def _accuracy(prediction) -> dict[str, float]:
    guesses = torch.as_tensor(prediction.predictions).argmax(-1)
    return {
        "accuracy": 100 * (guesses == torch.as_tensor(prediction.label_ids)).double().mean().item()
    }
