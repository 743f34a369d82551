"""transformers' Trainer on an injected model: a checkpoint holds the method, not the base.

``PeltTrainer`` and ``PeltSeq2SeqTrainer`` differ from transformers' own trainers in what they write
and read: the method as :func:`pelt_fast.save` writes it, and every parameter that trains. So a
prefix's MLP, which ``save`` leaves out, trains further after a resume. Under accelerate's FSDP2
(``inject(pack=False)`` first) every process gathers the method, the first one writes it, and the
base is in no checkpoint. Needs the extra ``train``.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pelt_fast.formats.checkpoint import save
from pelt_fast.formats.sharded import is_sharded, resharded
from pelt_fast.formats.training_state import load_trained, save_trained
from pelt_fast.injection.handles import METHOD, carrier_of
from pelt_fast.layouts.names import is_method, unwrapped


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None. Its last file is the trainer state."""
    checkpoints = [
        path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.name.rpartition("-")[2].isdigit() and _is_whole(path / TRAINER_STATE_NAME)
    ]  # fmt: skip
    return max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_text())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def _counted_as_adapter(model: nn.Module | None):
    """transformers refuses to train a quantised model unless it has an adapter, which it looks for
    under PEFT's name. A method is one."""
    if model is None or METHOD not in getattr(unwrapped(model), "__dict__", {}):
        yield
        return
    carrier = unwrapped(model)
    carrier._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del carrier._hf_peft_config_loaded


class MethodCheckpoints:
    """A mix-in for a Trainer's checkpoints. Name it before the Trainer's class."""

    def __init__(self, model: nn.Module | None = None, *args, **kwargs):
        with _counted_as_adapter(model):
            super().__init__(model, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As transformers' own. ``True`` resumes from the newest complete checkpoint; one that was
        interrupted while it was written is skipped."""
        carrier_of(self.model)  # a model without a method is refused now, not at the first save
        if resume_from_checkpoint is True:
            newest = last_checkpoint(self.args.output_dir)
            if newest is None:
                raise ValueError(
                    f"no complete checkpoint to continue from in {self.args.output_dir}"
                )
            resume_from_checkpoint = str(newest)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args, **kwargs):
        """As transformers' own, with the backward pass in the calling thread. In autograd's thread
        for a GPU, each of our ops takes 0.5 ms longer on the host (docs/facts.md)."""
        with torch.autograd.set_multithreading_enabled(False):
            return super().training_step(*args, **kwargs)

    def _plain_model(self, model: nn.Module | None = None) -> nn.Module:
        return carrier_of(
            self.accelerator.unwrap_model(
                self.model if model is None else model, keep_torch_compile=False
            )
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As transformers' own, without a method's learned scale: decay would pull that factor,
        which starts at one, to zero."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not (is_method(name) and name.endswith(".scale"))]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' own; that one would gather the base under FSDP."""
        if self.is_fsdp_enabled:
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers' own; that one would write the base beside the optimizer under FSDP."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        resharded(self.model)  # an evaluation before this left parameters gathered
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        model = self._plain_model()
        if not self.args.should_save and not is_sharded(model):
            return
        save(model, folder, include_trained=True)
        save_trained(model, folder)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_trained(self._plain_model(model), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        load_trained(self._plain_model(), Path(self.state.best_model_checkpoint))


class PeltTrainer(MethodCheckpoints, Trainer):
    """transformers' ``Trainer``, with checkpoints that hold the method alone."""


class PeltSeq2SeqTrainer(MethodCheckpoints, Seq2SeqTrainer):
    """transformers' ``Seq2SeqTrainer``, with checkpoints that hold the method alone."""
