"""What a recipe says to transformers' Trainer: the keywords of its TrainingArguments."""

import dataclasses
import math
import os
import sys
from pathlib import Path

import torch

from .recipe import Recipe
from .registry import LOWER_IS_BETTER
from .say import say


def settings(recipe: Recipe, output: Path, quiet: bool, keep: bool) -> dict:
    """The keywords of TrainingArguments, and of every class that is made of it.

    ``keep`` writes checkpoints to ``output`` and loads the best of them at the end. A precision
    that this machine does not have is said, unless ``quiet``.
    """
    gpu, precision = torch.cuda.is_available(), precision_here(recipe)
    if precision != recipe.precision and not quiet:
        say(f"precision {recipe.precision} is not for this CPU: training in fp32")
    return dict(
        output_dir=str(output), max_steps=recipe.steps or -1,
        num_train_epochs=recipe.epochs or 1.0, learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule, warmup_steps=_warmup(recipe),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.eval_batch_size,
        gradient_accumulation_steps=recipe.accumulation, max_grad_norm=recipe.max_grad_norm,
        label_smoothing_factor=recipe.label_smoothing, seed=recipe.seed, report_to=[],
        bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=not gpu,
        logging_steps=10, logging_nan_inf_filter=False, remove_unused_columns=False,
        disable_tqdm=quiet or not sys.stderr.isatty(), dataloader_pin_memory=gpu,
        **_checkpointing(recipe), **_saving(recipe, keep),
    )  # fmt: skip


def _checkpointing(recipe: Recipe) -> dict:
    """The keyword by its name in this transformers: the old one warns where there is a new one."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    new = "activation_checkpointing"
    return {new if new in names else "gradient_checkpointing": recipe.gradient_checkpointing}


def _saving(recipe: Recipe, keep: bool) -> dict:
    if not keep:
        return dict(save_strategy="no")
    when = "steps" if recipe.evaluate_every else "epoch"
    return dict(
        eval_strategy=when, save_strategy=when, eval_steps=recipe.evaluate_every or None,
        save_steps=recipe.evaluate_every or 500, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model=f"eval_{recipe.select_by}",
        greater_is_better=recipe.select_by not in LOWER_IS_BETTER,
    )  # fmt: skip


def precision_here(recipe: Recipe) -> str:
    """The precision of a run on this machine. A CPU that multiplies in bf16 runs bf16, in one
    process only: of several, transformers scores the first alone. Every other CPU runs fp32."""
    if torch.cuda.is_available():
        return recipe.precision
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    native = alone and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native and recipe.precision == "bf16" else "fp32"


def _warmup(recipe: Recipe) -> float:
    """The recipe's warmup, shorter than the run: transformers divides by the steps after it."""
    steps = math.ceil(recipe.warmup * recipe.steps) if recipe.warmup < 1 else recipe.warmup
    return recipe.steps - 1 if recipe.steps and steps == recipe.steps else recipe.warmup
