"""Train an injected model by a recipe, with transformers' Trainer, and measure it."""

import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .batches import LengthBatches
from .meter import Meter
from .metrics import accuracy, bleu, rouge
from .pretrained import from_pretrained
from .process import keep_freed_memory
from .recipe import Recipe
from .registry import Task, task_of
from .tokens import LENGTH

HELDOUT = "heldout"  # a final split that rates are chosen by


@dataclass
class Outcome:
    """The outcome of a run.

    ``metrics`` by name, or by split if there are several final splits; ``step_seconds``, the median
    of an optimizer step with its accumulation, without the first; ``peak_bytes`` of a GPU's memory
    or of a CPU process's resident set; ``seconds`` in all; the log.
    """

    metrics: dict[str, float]
    step_seconds: float
    peak_bytes: int
    seconds: float
    log: list[dict] = field(default_factory=list)


def load_model(recipe: Recipe, classes: tuple[str, ...] = ()):
    """Model and tokenizer of a recipe. Raises OSError when they cannot be loaded, ValueError when
    the model has fewer positions than a row has tokens or the tokenizer cannot pad."""
    from transformers import (
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    if not recipe.model:
        raise ValueError("model is missing: a recipe names one, or --model a folder or hub name")
    task = task_of(recipe.task)
    tokenizer = from_pretrained(AutoTokenizer, recipe.model)
    kind = AutoModelForSeq2SeqLM if task.generates else AutoModelForSequenceClassification
    options = dict(recipe.model_config)
    if classes:
        options |= dict(num_labels=len(classes), id2label=dict(enumerate(classes)),
                        label2id={name: i for i, name in enumerate(classes)},
                        ignore_mismatched_sizes=True)  # fmt: skip
    model = from_pretrained(kind, recipe.model, **options)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"the tokenizer of {recipe.model} has no pad token: set one, tokenizer.pad_token = ..."
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    _check_length(model, recipe)
    if task.generates:
        prepare_generation(model, tokenizer, task, recipe)
    return model, tokenizer


def _check_length(model: nn.Module, recipe: Recipe) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    if model.config.model_type in ("roberta", "xlm-roberta"):
        positions -= model.config.pad_token_id + 1  # its positions begin after the padding index
    for name in ("max_length", "max_target")[: 1 + task_of(recipe.task).generates]:
        if getattr(recipe, name) > positions:
            raise ValueError(
                f"{name}={getattr(recipe, name)} is longer than the {positions} positions of"
                f" {recipe.model}"
            )


def prepare_generation(model: nn.Module, tokenizer, task: Task, recipe: Recipe) -> None:
    """Write the recipe's generation settings to the model's config."""
    config = model.generation_config
    if task.codes and hasattr(tokenizer, "lang_code_to_id"):
        tokenizer.src_lang, tokenizer.tgt_lang = task.codes
        start = tokenizer.convert_tokens_to_ids(task.codes[1])
        model.config.decoder_start_token_id = config.decoder_start_token_id = start
    config.num_beams, config.no_repeat_ngram_size = recipe.beams, recipe.no_repeat_ngram
    config.max_new_tokens, config.max_length = recipe.max_generated, None
    config.min_new_tokens, config.min_length = recipe.min_generated or None, None
    config.early_stopping = recipe.beams > 1


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """The trained parameters with their learning rate and decay. A prefix's reparameterisation
    gets ``prefix_rate`` of the rate; biases and LayerNorms get no decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = any(step.endswith("_prefix") for step in name.split("."))
            rate = recipe.learning_rate * (recipe.prefix_rate if slow else 1)
            decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": found, "lr": rate, "weight_decay": decay}
        for (rate, decay), found in groups.items()
    ]


def fit(
    model: nn.Module, tokenizer, recipe: Recipe, train, validation, finals: dict, output: Path,
    *, resume: bool = False, quiet: bool = False, keep: bool = True,
) -> Outcome:  # fmt: skip
    """Train an injected model in place and score it.

    ``train``, ``validation`` and each of ``finals`` are tokenised rows (``tokens.tokenised``).
    ``keep`` writes checkpoints to ``output`` and loads the best of them at the end; ``resume``
    continues from the newest. Raises RuntimeError when the extra is missing.
    """
    try:
        trainer = _trainer(model, tokenizer, recipe, train, validation, output, quiet, keep)
    except ImportError as error:
        raise RuntimeError(
            f"training needs the extra: pip install 'pelt_fast[train]' ({error})"
        ) from None
    if not torch.cuda.is_available():
        keep_freed_memory()
    meter = Meter()
    trainer.add_callback(meter.callback(output if keep else None))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    seconds = time.perf_counter() - start
    metrics = {}
    for name, rows in finals.items():
        scores = _scores(trainer, rows, by_loss=name == HELDOUT and recipe.select_by == "loss")
        named = len(finals) > 1 or name == "matched"
        metrics |= {name: scores["accuracy"]} if named and "accuracy" in scores else scores
    return Outcome(metrics, meter.median, meter.peak(), seconds, trainer.state.log_history)


def _scores(trainer, rows, by_loss: bool) -> dict[str, float]:
    """The metrics of rows. ``by_loss``: the loss alone, without generation."""
    rows = _without_length(_by_length(rows))
    if by_loss:
        return {"loss": trainer.evaluate(rows)["eval_loss"]}
    found = trainer.predict(rows, metric_key_prefix="final").metrics
    scores = {key.removeprefix("final_"): value for key, value in found.items()}
    wanted = ("accuracy", "bleu", "bleu_normalised", "rouge1", "rouge2", "rougeL", "loss")
    wanted = wanted[:-1] if "accuracy" in scores else wanted
    return {key: scores[key] for key in wanted if key in scores}


def _by_length(rows):
    """Rows from long to short: batches need little padding, and the largest comes first."""
    lengths = rows[LENGTH]
    return rows.select(sorted(range(len(rows)), key=lambda row: -lengths[row]))


def _trainer(model, tokenizer, recipe: Recipe, train, validation, output, quiet, keep):
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding
    from transformers.trainer_callback import PrinterCallback

    from pelt_fast.integrations.trainer import PeltSeq2SeqTrainer, PeltTrainer

    task = task_of(recipe.task)

    class Run(PeltSeq2SeqTrainer if task.generates else PeltTrainer):
        """The Trainer, with batches of rows of similar length."""

        def get_train_dataloader(self):
            budget = dict(batch_tokens=recipe.batch_tokens) if recipe.batch_tokens else dict(
                batch_size=recipe.batch_size
            )  # fmt: skip
            sampler = LengthBatches(train[LENGTH], seed=recipe.seed, **budget,
                                    multiple=self.args.world_size)  # fmt: skip
            loader = torch.utils.data.DataLoader(
                _without_length(train), batch_sampler=sampler, collate_fn=self.data_collator
            )
            with _uneven(self.accelerator):
                return self.accelerator.prepare(loader)

        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = _optimizer(self.model, recipe)
            return self.optimizer

        def predict(self, *args, **kwargs):
            # the last evaluation scores, even if checkpoints are selected by the loss
            self.args.predict_with_generate, self.compute_metrics = task.generates, score
            return super().predict(*args, **kwargs)

    if recipe.eval_examples and len(validation) > recipe.eval_examples:
        validation = validation.select(range(recipe.eval_examples))
    if task.generates:
        collate = DataCollatorForSeq2Seq(tokenizer, model=model)
        score = _text_scores(tokenizer, task)
    else:
        collate, score = DataCollatorWithPadding(tokenizer), _accuracy
    # selected by the loss, nothing is scored in between: the logits would fill the memory
    on_the_way = None if task.generates and recipe.select_by == "loss" else score
    run = Run(
        model=model, args=_arguments(recipe, task, output, quiet, keep), data_collator=collate,
        train_dataset=train, eval_dataset=_without_length(_by_length(validation)),
        compute_metrics=on_the_way,
    )  # fmt: skip
    # the label smoother divides by the Trainer's count of tokens; a model's own loss is a mean
    # already, and with the count the Trainer would scale it by accumulation and processes
    run.model_accepts_loss_kwargs = recipe.label_smoothing > 0
    if quiet:
        run.remove_callback(PrinterCallback)
    if task.generates:
        run.args.predict_with_generate = on_the_way is not None
    return run


@contextmanager
def _uneven(accelerator):
    """Let batches differ in size; their number is a multiple of the number of processes. Evaluation
    keeps even batches, or a process would wait for one that has none left."""
    even, accelerator.even_batches = accelerator.even_batches, False
    try:
        yield
    finally:
        accelerator.even_batches = even


def _without_length(rows):
    return rows.remove_columns(LENGTH)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameter_groups(model, recipe), betas=recipe.adam_betas, eps=recipe.adam_epsilon
    )


def _arguments(recipe: Recipe, task: Task, output: Path, quiet: bool, keep: bool):
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    kind = Seq2SeqTrainingArguments if task.generates else TrainingArguments
    gpu, precision = torch.cuda.is_available(), precision_here(recipe)
    if precision != recipe.precision and not quiet:
        print(f"precision {recipe.precision} is not for this CPU: training in fp32",
              file=sys.stderr)  # fmt: skip
    when = "steps" if recipe.evaluate_every else "epoch"
    saving = dict(
        eval_strategy=when, save_strategy=when, eval_steps=recipe.evaluate_every or None,
        save_steps=recipe.evaluate_every or 500, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model=f"eval_{recipe.select_by}",
        greater_is_better=recipe.select_by != "loss",
    ) if keep else dict(save_strategy="no")  # fmt: skip
    return kind(
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
        **saving,
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


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": accuracy(prediction.predictions.argmax(-1), prediction.label_ids)}


def _text_scores(tokenizer, task: Task):
    def score(prediction) -> dict[str, float]:
        texts = []
        for ids in (prediction.predictions, prediction.label_ids):
            ids = [[i if i >= 0 else tokenizer.pad_token_id for i in row] for row in ids.tolist()]
            texts.append(
                [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            )
        return bleu(*texts) if task.languages else rouge(*texts)

    return score
