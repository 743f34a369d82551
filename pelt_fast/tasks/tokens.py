"""Rows as token ids, made once and kept in ``datasets``' cache."""

from .registry import Task

LENGTH = "length"


def tokenised(
    rows, task: Task, tokenizer, max_length: int, max_target: int, source_prefix: str = ""
):
    """Each row as input_ids, attention_mask, labels and ``length``, the longer side's. Labels that
    are cut still end with the tokenizer's end token."""

    def encode(batch: dict) -> dict:
        if task.generates:
            sources = [f"{source_prefix}{text}" for text in batch["source"]]
            found = tokenizer(sources, truncation=True, max_length=max_length)
            targets = tokenizer(text_target=batch["target"], truncation=True, max_length=max_target)
            found["labels"] = targets["input_ids"]
            pairs = zip(found["input_ids"], found["labels"])
            return {**found, LENGTH: [max(len(source), len(target)) for source, target in pairs]}
        found = tokenizer(batch["text"], batch.get("pair"), truncation=True, max_length=max_length)
        lengths = [len(ids) for ids in found["input_ids"]]
        return {**found, "labels": batch["label"], LENGTH: lengths}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)
