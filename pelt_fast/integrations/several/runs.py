"""What a run of one method is asked for, and what comes of it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Number = int | float


@dataclass(frozen=True)
class MethodRun:
    """How :func:`pelt_fast.train_several` trains one method.

    Args:
        dataset: the method's rows, with a length and an index: a list, a dataset of torch or of
            ``datasets``. A row is what ``data_collator`` takes.
        learning_rate: AdamW's rate, before the schedule.
        steps: how many optimizer steps the method trains; epochs follow from them.
        batch_size: rows of a step. The last batch of an epoch has the rows that are left.
        schedule: "linear", "cosine", "cosine_with_restarts", "polynomial", "constant",
            "constant_with_warmup" or "inverse_sqrt", as in transformers.
        warmup_steps: the first steps, in which the rate rises from 0.
        seed: of the order of the rows and of the method's own dropout masks.
        weight_decay: AdamW's; biases, norms and learned scales get none.
        max_grad_norm: gradients of the method are scaled to this norm at most; 0: never.
        folder: where the method is saved when it ends; None: nowhere.
        stop_above: a loss above this stops the method; None: a loss that is not finite alone.

    Example:
        pelt_fast.MethodRun(rows, learning_rate=1e-3, steps=300, folder="runs/slow")
    """

    dataset: Any
    learning_rate: float
    steps: int
    batch_size: int = 8
    schedule: str = "linear"
    warmup_steps: int = 0
    seed: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    folder: str | os.PathLike | None = None
    stop_above: float | None = None


@dataclass
class MethodResult:
    """What came of a run.

    ``steps`` is the number of steps that the parameters have taken, and ``losses`` has the loss of
    each. ``stopped`` is None, or why the method was stopped before its last step. ``folder`` is
    where it was saved, or None.
    """

    steps: int
    losses: Sequence[float] = field(repr=False)
    stopped: str | None
    folder: Path | None
