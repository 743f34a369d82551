"""Rows as token ids, made once and kept in ``datasets``' cache."""

from .registry import Task

LENGTH = "length"


def check_vocabulary(rows: dict, tokenizer, config, model: str) -> None:
    """ValueError where rows, or what pads them, have a token that the model has no embedding of."""
    check_token(max(tokenizer.pad_token_id or 0, *map(_largest, rows.values())), config, model)


def _largest(rows) -> int:
    """The largest id of rows. A classification's labels are numbers, not lists of ids."""
    import pyarrow.compute as arrow
    from pyarrow.types import is_list

    names = [name for name in ("input_ids", "labels") if is_list(rows.data.column(name).type)]
    ids = (arrow.list_flatten(rows.data.column(name)) for name in names)
    return max(arrow.max(column).as_py() or 0 for column in ids)


def check_token(largest: int, config, model: str) -> None:
    """ValueError for an id that the model has no embedding of."""
    text = vars(config.get_text_config())
    sizes = [n for name, n in text.items() if name.endswith("vocab_size") and isinstance(n, int)]
    if sizes and largest >= max(sizes):
        raise ValueError(
            f"the tokenizer of {model} makes the token {largest:,}, the model knows those below"
            f" {max(sizes):,}: resize its embeddings, and save it"
        )


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
