"""A run from its recipe to a row of results."""

import math
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import pelt_fast
from pelt_fast.config import PeltConfig

from .data import Data, load
from .estimate import estimate, free_memory
from .fitting import checked_config
from .instruct.tokens import of_splits as instruct_tokens
from .loading import check_here, load_tokenizer, load_weights
from .meter import append_line
from .output import check_output
from .recipe import Recipe
from .registry import task_of
from .tokens import check_vocabulary, tokenised
from .train import Outcome, fit

RESULTS = Path("runs/results.jsonl")


def run(
    recipe: Recipe, source, output: Path, *, resume: bool = False, quiet: bool = False,
    results: Path = RESULTS,
) -> dict:  # fmt: skip
    """Read, inject, train, score, save; appends the row to ``results`` and returns it.

    ``source`` is a folder, files by split, or None, as in ``data.load``. With several processes
    (``accelerate launch``, DDP or FSDP2) the first one writes.

    Raises before weights are read: what loading raises; what inject raises for the method;
    ValueError for FSDP 1, for a quantised base under FSDP, for an ``output`` that holds a run
    already, or none to ``resume``. Raises before training: ValueError for a recipe that needs more
    memory than is free; OSError when the disk has no room. Raises RuntimeError after training when
    the loss became infinite; then nothing is saved as a result.
    """
    fsdp = asks_for_fsdp()
    check_here(recipe)
    check_output(output, resume)
    if fsdp and recipe.quantize:
        raise ValueError(f"quantize={recipe.quantize!r} is not sharded: launch with DDP")
    # rows of the disk come before the model, rows of the hub after it
    config = checked_config(recipe) if source is None else None
    data = load(task_of(recipe.task), source)
    config = config or checked_config(recipe)
    tokenizer = load_tokenizer(recipe, config)
    rows = tokens_of(data, recipe, tokenizer)
    check_vocabulary(rows, tokenizer, config, recipe.model)
    model = load_weights(recipe, tokenizer, data.classes)
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    if not fsdp and not recipe.quantize:  # FSDP2 shards the model first; a quantised one is placed
        model.to(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    pelt_fast.inject(model, recipe.config(), pack=not fsdp)
    check_memory(model, recipe)
    check_disk(model, output)
    finals = {name: rows[name] for name in data.finals}
    outcome = fit(model, tokenizer, recipe, rows["train"], rows["validation"], finals, output,
                  resume=resume, quiet=quiet)  # fmt: skip
    loss = next((e["train_loss"] for e in outcome.log if "train_loss" in e), 0.0)
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss became {loss}: take a smaller learning_rate or longer warmup")
    row = result(recipe, recipe.config(), model, outcome)
    row |= {"rows": len(rows["train"]), "classes": list(data.classes)}
    if rank == 0 or fsdp:  # under FSDP2 every process gathers, the first one writes
        pelt_fast.save(model, output)
    if rank == 0:
        append_line(results, row)
    return row


def asks_for_fsdp() -> bool:
    """Whether ``accelerate launch`` requests FSDP. Raises ValueError for its first version."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("1", "true"):
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"FSDP {version} flattens frozen and trained parameters into one: launch with"
            " --fsdp_version 2"
        )
    return True


def tokens_of(data: Data, recipe: Recipe, tokenizer) -> dict:
    """Tokenised rows: train, validation and each of the finals."""
    splits = {"train": data.train, "validation": data.validation, **data.finals}
    task = task_of(recipe.task)
    if task.causal:
        return instruct_tokens(splits, recipe, tokenizer)
    return {
        name: tokenised(
            rows, task, tokenizer, recipe.max_length, recipe.max_target, recipe.source_prefix
        )
        for name, rows in splits.items()
    }


def result(recipe: Recipe, config: PeltConfig, model: nn.Module, outcome: Outcome) -> dict:
    """One row of results: settings, scores, costs, versions, device."""
    count = pelt_fast.count_parameters(model)
    gpu, cores = torch.cuda.is_available(), torch.get_num_threads()
    return {
        "recipe": recipe.name, "task": recipe.task, "model": Path(recipe.model).name,
        "method": config.name, "seed": recipe.seed, "learning_rate": recipe.learning_rate,
        "steps": recipe.steps, "epochs": recipe.epochs, "metrics": outcome.metrics,
        "step_seconds": outcome.step_seconds, "peak_bytes": outcome.peak_bytes,
        "seconds": outcome.seconds, "parameters": {**asdict(count), "percent": count.percent},
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {cores} threads",
        "versions": {"pelt_fast": pelt_fast.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
    }  # fmt: skip


def check_memory(model: nn.Module, recipe: Recipe) -> None:
    """Raise ValueError, with the estimate, when the device has less memory than the run needs."""
    device = next(model.parameters()).device
    needed, there = estimate(model, recipe).bytes, free_memory(device)
    if there is not None and needed > there:
        raise ValueError(
            f"this recipe needs about {needed / 1e9:.1f} GB on {device}, {there / 1e9:.1f} GB are"
            " free: take a smaller batch_size or batch_tokens (with more accumulation), or a"
            " shorter max_length"
        )


def check_disk(model: nn.Module, output: Path) -> None:
    """Raise OSError when the disk has no room for three checkpoints of method and optimizer."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if 12 * trained > free:
        raise OSError(
            f"{output} has room for {free / 1e9:.2f} GB, the checkpoints of this run take about"
            f" {12 * trained / 1e9:.2f} GB"
        )
