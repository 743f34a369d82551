"""Full fine-tuning: every weight trains."""

import copy
from collections.abc import Iterator
from pathlib import Path

from benchmarks.problems import Problem, Provider
from benchmarks.whole import Trained

NAME = "full fine-tuning"


def layer(problem: Problem) -> Iterator[Provider]:
    """It is a method of whole models."""
    return iter(())


def model(base, config, injected) -> Iterator[Trained]:
    """What is kept is the model."""
    whole = copy.deepcopy(base).requires_grad_(True)

    def save(folder: Path) -> None:
        whole.save_pretrained(folder)

    yield Trained(NAME, whole, None, save)
