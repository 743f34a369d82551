"""The rows of each step: a batch of every method that has not taken all its steps."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from .runs import MethodRun


def seed_of(seed: int, what: str, number: int) -> int:
    """A seed for the epoch or the step ``number`` of a run, for torch's generators (32 bits)."""
    return random.Random(f"{seed} {what} {number}").getrandbits(32)


class Step:
    """The rows of one step by method. It is no container: accelerate leaves it as it is."""

    def __init__(self, rows: dict[str, list[Any]]):
        self.rows = rows


class Steps(Dataset):
    """Item i is what step i of all runs reads. The order of a run's rows depends on its seed and on
    the number of its rows alone."""

    def __init__(self, runs: Mapping[str, MethodRun]):
        self.runs = dict(runs)
        self._orders: dict[str, tuple[int, list[int]]] = {}  # of the epoch that was read last

    def __len__(self) -> int:
        return max(run.steps for run in self.runs.values())

    def __getitem__(self, step: int) -> Step:
        return Step({
            name: [run.dataset[row] for row in self._rows(name, run, step)]
            for name, run in self.runs.items() if step < run.steps
        })  # fmt: skip

    def _rows(self, name: str, run: MethodRun, step: int) -> list[int]:
        count = len(run.dataset)
        epoch, batch = divmod(step, -(-count // run.batch_size))
        if self._orders.get(name, (None,))[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(run.seed, "epoch", epoch))
            self._orders[name] = epoch, torch.randperm(count, generator=generator).tolist()
        first = batch * run.batch_size
        return self._orders[name][1][first : first + run.batch_size]


def only(steps: list[Step]) -> dict[str, Step]:
    """Collates the one item of a batch."""
    (step,) = steps
    return {"step": step}
