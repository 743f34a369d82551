"""The Trainer of the task instruct: TRL's SFTTrainer, packed without padding, scored exactly."""

from contextlib import contextmanager
from pathlib import Path

import torch

from ..arguments import settings
from ..optimizer import optimizer
from ..recipe import Recipe
from ..say import say
from ..tokens import LENGTH
from .generations import callback
from .scores import scores, token_sums


def trainer(model, tokenizer, recipe: Recipe, train, validation, output: Path, quiet, keep):
    """The Trainer of an injected model on tokenised rows. With ``keep`` it writes generations
    beside the log. Raises ImportError without TRL."""
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from pelt_fast.integrations.trl import PeltSFTTrainer

    class Run(PeltSFTTrainer):
        """Trained on packed rows where the model keeps them apart; evaluated on rows as they are,
        padded, with exact scores."""

        def _tell(self, line):
            say(line)

        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = optimizer(self.model, recipe)
            return self.optimizer

        def get_eval_dataloader(self, eval_dataset=None):
            with _padded(self, collate):
                return super().get_eval_dataloader(eval_dataset)

        def get_test_dataloader(self, test_dataset):
            with _padded(self, collate):
                return super().get_test_dataloader(test_dataset)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            labels = inputs.pop("labels")
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(**inputs, use_cache=False).logits
            return None, token_sums(logits, labels), labels[:, 0]

    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
    if recipe.eval_examples and len(validation) > recipe.eval_examples:
        validation = validation.select(range(recipe.eval_examples))
    run = Run(
        model=model, args=_arguments(recipe, output, quiet, keep),
        train_dataset=train.remove_columns(LENGTH), eval_dataset=validation.remove_columns(LENGTH),
        processing_class=tokenizer, compute_metrics=scores,
    )  # fmt: skip
    if quiet:
        run.remove_callback(PrinterCallback)
    if keep:
        run.add_callback(callback(validation, tokenizer, output, recipe.max_generated))
    return run


def _arguments(recipe: Recipe, output: Path, quiet: bool, keep: bool):
    """TRL's settings. The rows are cut already, and their labels say what is learned."""
    from trl import SFTConfig

    given = settings(recipe, output, quiet, keep)
    return SFTConfig(
        **given, max_length=recipe.max_length, packing=recipe.packing, eval_packing=False,
        completion_only_loss=False,
    )  # fmt: skip


@contextmanager
def _padded(trainer, collate):
    """Let a Trainer make batches with another collator."""
    own, trainer.data_collator = trainer.data_collator, collate
    try:
        yield
    finally:
        trainer.data_collator = own
