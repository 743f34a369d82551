"""Full fine-tuning: every weight trains."""

import copy
from collections.abc import Iterator
from pathlib import Path

from benchmarks.problems import Problem, Provider
from benchmarks.whole import Trained

NAME = "full fine-tuning"


def layer(problem: Problem) -> Iterator[Provider]:
    """None: full fine-tuning is a method of whole models."""
    return iter(())


def model(base, config, injected) -> Iterator[Trained]:
    """The model with every weight trained; the whole model is saved."""
    whole = copy.deepcopy(base).requires_grad_(True)

    def save(folder: Path) -> None:
        whole.save_pretrained(folder)

    yield Trained(NAME, whole, None, save)
