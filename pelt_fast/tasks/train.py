"""Train an injected model by a recipe, with transformers' Trainer, and measure it."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .arguments import settings
from .batches import LengthBatches
from .instruct.trainer import trainer as instruct_trainer
from .meter import Meter
from .metrics import accuracy, bleu, rouge
from .optimizer import optimizer
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


def fit(
    model: nn.Module, tokenizer, recipe: Recipe, train, validation, finals: dict, output: Path,
    *, resume: bool = False, quiet: bool = False, keep: bool = True,
) -> Outcome:  # fmt: skip
    """Train an injected model in place and score it.

    ``train``, ``validation`` and each of ``finals`` are tokenised rows (``tokens.tokenised``).
    ``keep`` writes checkpoints to ``output`` and loads the best of them at the end; ``resume``
    continues from the newest. Raises RuntimeError when the extra is missing.
    """
    causal = task_of(recipe.task).causal
    make, extra = (instruct_trainer, "instruct") if causal else (_trainer, "train")
    try:
        trainer = make(model, tokenizer, recipe, train, validation, output, quiet, keep)
    except ImportError as error:
        raise RuntimeError(
            f"training needs the extra: pip install 'pelt_fast[{extra}]' ({error})"
        ) from None
    # the model before training (under LoRA, the base) beside what it becomes
    trainer.args.eval_on_start = causal and keep and not resume
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
    wanted = ["accuracy", "bleu", "bleu_normalised", "rouge1", "rouge2", "rougeL"]
    wanted += [] if "accuracy" in scores else ["loss", "perplexity", "token_accuracy"]
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
                self.optimizer = optimizer(self.model, recipe)
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


def _arguments(recipe: Recipe, task: Task, output: Path, quiet: bool, keep: bool):
    from transformers import Seq2SeqTrainingArguments, TrainingArguments

    kind = Seq2SeqTrainingArguments if task.generates else TrainingArguments
    return kind(**settings(recipe, output, quiet, keep))


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
