"""train_several: named methods of one model, each trained by its own run, in the same steps."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pelt_fast.compose.together import together_of
from pelt_fast.injection.handles import carrier_of
from pelt_fast.modules.routing import Routing

from .checks import check_arguments, check_runs
from .runs import MethodResult, MethodRun


def train_several(
    model: nn.Module,
    runs: Mapping[str, MethodRun],
    *,
    output_dir: str | os.PathLike,
    data_collator: Callable[[list], Mapping[str, Any]] | None = None,
    resume_from_checkpoint: str | os.PathLike | bool | None = None,
    **training_arguments: Any,
) -> dict[str, MethodResult]:
    """Train several methods of one model at once, with transformers' Trainer.

    Each method has its own rows, rate, schedule, seed and number of steps. A step is one forward
    and backward of a batch of every method that still trains; each gets the gradient that it would
    get alone. A method that ends is saved at once, and the others go on. One whose loss is not
    finite is stopped, and the others do not notice.

    A method's numbers depend on its run alone, to rounding, if the base drops nothing: the base's
    own dropout draws one mask for all rows. The batch is padded to its longest row; a method that
    drops something needs rows of one length (``padding="max_length"``) to draw equal masks in
    other company.

    Args:
        model: a model that :func:`pelt_fast.inject_named` was called on with ``together=True``.
            Methods that ``runs`` does not name stay as they are.
        runs: a :class:`pelt_fast.MethodRun` by the name of each method that trains.
        output_dir: the Trainer's folder, for its checkpoints.
        data_collator: makes a batch with ``labels`` of a list of rows, those of all methods
            together. None: transformers' default.
        resume_from_checkpoint: a checkpoint's folder, or True: the newest in ``output_dir``. The
            runs must be those of the checkpoint. It needs ``save_strategy="steps"`` before.
        **training_arguments: further fields of transformers' TrainingArguments (``bf16``,
            ``logging_steps``, ``gradient_checkpointing``, ``save_strategy``, which is "no" here).

    Returns:
        For each name ``steps``, ``losses`` (one a step), ``stopped`` (None, or why) and ``folder``
        (where it was saved, or None). The Trainer's log has ``loss/NAME`` and
        ``learning_rate/NAME``.

    Raises:
        ValueError: an unknown method, methods that are not together, an argument of a run or of the
            Trainer that has no meaning here, or a model whose loss is not known. Nothing was
            trained.
        TypeError: an argument is of another type.
        RuntimeError: the extra ``train`` is missing, or a block of ``disabled(model)`` is open.

    Saved:
        Each method in its run's ``folder``, as :func:`pelt_fast.save` writes it.

    Example:
        pelt_fast.inject_named(model, {"slow": "lora", "fast": "lora"}, together=True)
        run = pelt_fast.MethodRun(rows, learning_rate=1e-4, steps=300, folder="runs/slow")
        fast = dataclasses.replace(run, learning_rate=1e-3, folder="runs/fast")
        results = pelt_fast.train_several(
            model, {"slow": run, "fast": fast}, data_collator=collate, output_dir="runs"
        )
        print(results["fast"].losses[-1], results["fast"].stopped)
    """
    carrier = carrier_of(model)
    injection = together_of(carrier)
    check_runs(carrier, injection, runs)
    check_arguments(training_arguments)
    trainer = _trainer(model, dict(runs), output_dir, data_collator, training_arguments)
    resume = resume_from_checkpoint
    with _generators(injection.routing, runs):
        trainer.train(os.fspath(resume) if isinstance(resume, os.PathLike) else resume or None)
    model.zero_grad()
    return trainer.methods.results()


def _trainer(model: nn.Module, runs: dict[str, MethodRun], output_dir, data_collator, given: dict):
    try:
        from transformers import TrainingArguments

        from .trainer import SeveralTrainer

        arguments = TrainingArguments(
            output_dir=os.fspath(output_dir), **{"save_strategy": "no", "report_to": [], **given},
            max_steps=max(run.steps for run in runs.values()), per_device_train_batch_size=1,
            max_grad_norm=0.0,
        )  # fmt: skip
    except ImportError as error:
        raise RuntimeError(
            f"training needs the extra: pip install 'pelt_fast[train]' ({error})"
        ) from None
    if arguments.world_size > 1:
        raise ValueError(
            f"one process trains all methods, this is one of {arguments.world_size}: start without"
            " a launcher"
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a batch is not split over GPUs
    return SeveralTrainer(model, arguments, runs, data_collator)


@contextmanager
def _generators(routing: Routing, runs: Mapping[str, MethodRun]) -> Iterator[None]:
    """In this block each method that trains draws its seeds from a generator of its own."""
    before = dict(routing.generators)
    routing.generators.update({routing.ids[name]: torch.Generator() for name in runs})
    try:
        yield
    finally:
        routing.generators.clear()
        routing.generators.update(before)
