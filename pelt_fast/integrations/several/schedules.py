"""The learning rate's factor at each step, from transformers' schedules."""

import warnings
from collections.abc import Callable

import torch
from transformers import get_scheduler

from .runs import MethodRun

# those that transformers makes without further settings
SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
)  # fmt: skip


def factor(run: MethodRun) -> Callable[[int], float]:
    """By what a run's rate is multiplied, of the number of steps that were taken. Raises ValueError
    for a rate that the schedule cannot begin with."""
    alone = torch.optim.SGD([torch.zeros(1)], lr=run.learning_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an optimizer that never steps
        made = get_scheduler(run.schedule, alone, run.warmup_steps, run.steps)
    return made.lr_lambdas[0]
