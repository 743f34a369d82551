"""A plugin of pytest: every test's launches run on the machine.

``pytest -p tests.ptx.plugin --machine sm90 --order late tests/numerics``. With ``--report FOLDER``
what each test launched is written there, for ``python -m tests.ptx.emulate``.
"""

import json
import os
import time
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before tests/conftest.py, which only sets what is not set

import pytest

ORDERS = {"early": {}, "late": {"late": True}, "shuffled": {"shuffled": True, "seed": 1}}


def pytest_addoption(parser):
    group = parser.getgroup("machine")
    group.addoption("--machine", default="sm90", help="sm80 or sm90")
    group.addoption("--order", default="early", choices=list(ORDERS))
    group.addoption("--report", default=None, help="a folder for what was launched")


class Record:
    """What one test launched and how near its numbers came to the budget."""

    def __init__(self):
        self.launches: list[dict] = []
        self.worst = 0.0
        self.last = time.perf_counter()

    def launched(self, launch, counts) -> None:
        now = time.perf_counter()
        self.launches.append(dict(
            kernel=launch.entry.name, dtype=launch.dtype, instructions=int(counts.instructions.sum()),
            sectors=counts.sectors, least=counts.least, wavefronts=counts.wavefronts,
            free=counts.free, loaded=counts.loaded, stored=counts.stored, seconds=counts.seconds,
        ))  # fmt: skip
        self.last = now

    def checked(self, ratio: float) -> None:
        self.worst = max(self.worst, ratio)


@pytest.fixture(autouse=True)
def on_machine(request, monkeypatch):
    """The machine in the place of a GPU: the target's tiles, a few processors."""
    from pelt_fast import env
    from pelt_fast.kernels import config
    from tests.numerics import judge

    from . import cuda_launch
    from .machine import Mode
    from .triton_launch import on_the_machine
    from .unwritten import Unwritten

    target = request.config.getoption("--machine")
    order = request.config.getoption("--order")
    record = Record()
    monkeypatch.setattr(env, "interpret", lambda: True)  # the backend "triton" runs CPU tensors
    monkeypatch.setattr(config, "architecture", lambda device: target)
    monkeypatch.setattr(config, "processors", lambda device: 4)
    monkeypatch.setattr(judge, "watched", record.checked)
    report = request.config.getoption("--report")
    watch = record.launched if report else None
    monkeypatch.setattr(cuda_launch, "watched", watch)
    with Unwritten(), on_the_machine(target, Mode(**ORDERS[order]), watch):
        yield
    if report and record.launches:
        line = dict(test=request.node.nodeid, target=target, order=order, worst=record.worst,
                    launches=record.launches)  # fmt: skip
        with open(Path(report) / f"{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
