"""A plugin of pytest: every test's launches run on the machine.

``pytest -p tests.ptx.plugin --machine sm90 --order late tests/numerics``. With ``--report FOLDER``
what each test launched is written there, for ``python -m tests.ptx.emulate``. ``--few`` takes a few
tests of each kernel, each in one of the orders in turn, and counts nothing: what
``test_kernels.py`` runs.
"""

import json
import os
from pathlib import Path

import pytest

ORDERS = {"early": {}, "late": {"late": True}, "shuffled": {"shuffled": True, "seed": 1}}
FEW = (  # parts of the names of tests
    "_rank_down_matches_fp64_oracle[0.3-70x300x16-torch.bfloat16", "kernels_take_them[torch.bfloat16",
    "_rank_down_bwd_matches_fp64_oracle[0.3-70x300x16-torch.bfloat16", "up_matches_fp64_oracle[False-base-70x300x16-torch.b",
    "up_matches_fp64_oracle[True-update-33x264x64-torch.b", "up_bwd_matches_fp64_oracle[gelu-0.3-70x300x16-torch.b",
    "up_bwd_matches_fp64_oracle[identity-0.0-33x264x64-torch.b", "0.3-37x130x8-torch.float32",
    "a_layer_norm_matches_fp64_oracle[(70, 264, 64)-torch.bfloat16", "bwd_matches_fp64_oracle[True-(70, 264, 64)-torch.b",
    "0.0-False-(40, 264, 136, 64)-torch.b", "0.3-True-(37, 130, 44, 16)-torch.float16",
    "(9, 264)-True-0.3-torch.bfloat16", "(9, 264)-False-0.3-torch.bfloat16",
    "torch.bfloat16-2x2x1x70x30x64-softmax-gated-0.3", "torch.bfloat16-2x2x1x70x30x64-relu-add-0.0",
    "bwd_matches_fp64_oracle[torch.float16-2x4x2x37x5x32-softmax-add-0.3", "[ffn gated p=0.1-torch.bfloat16",
    "[ffn plain p=0.1-torch.float16", "0.0-(40, 64, 136, 16)-True-torch.bfloat16",
    "-0.3-(40, 64, 136, 16)-False-torch.bfloat16", "test_the_loss_and_the_gradients",
    "test_two_stages", "routed_down_matches_fp64_oracle[dropped-unsorted-torch.bfloat16",
    "routed_up_matches_fp64_oracle[adapter-unsorted-torch.bfloat16", "routed_down_bwd_matches_fp64_oracle[dropped-one-torch.bf",
    "routed_up_bwd_matches_fp64_oracle[lora-unsorted-torch.bfloat16", "same_bits[torch.bfloat16",
    "bfloat16-several blocks-softmax-gated", "bfloat16-parts-relu-add",
)  # fmt: skip


def pytest_addoption(parser):
    # only where this is a plugin, and before tests/conftest.py, which sets what is not set
    os.environ["TRITON_INTERPRET"] = "0"
    group = parser.getgroup("machine")
    group.addoption("--machine", default="sm90", help="sm80 or sm90")
    group.addoption("--order", default="early", choices=list(ORDERS))
    group.addoption("--few", action="store_true", help="a few tests of each kernel")
    group.addoption("--report", default=None, help="a folder for what was launched")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--few"):
        items[:] = [item for item in items if any(part in item.name for part in FEW)]
        for n, item in enumerate(items):
            item.order = list(ORDERS)[n % len(ORDERS)]


class Record:
    """What one test launched and how near its numbers came to the budget; ``worst`` is None where
    it compares by no budget."""

    def __init__(self):
        self.launches: list[dict] = []
        self.worst: float | None = None

    def launched(self, launch, counts) -> None:
        self.launches.append(dict(
            kernel=launch.entry.name, dtype=launch.dtype, instructions=int(counts.instructions.sum()),
            sectors=counts.sectors, least=counts.least, wavefronts=counts.wavefronts,
            free=counts.free, loaded=counts.loaded, stored=counts.stored, seconds=counts.seconds,
        ))  # fmt: skip

    def checked(self, ratio: float) -> None:
        self.worst = max(self.worst or 0.0, ratio)


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
    order = getattr(request.node, "order", request.config.getoption("--order"))
    record = Record()
    monkeypatch.setattr(env, "interpret", lambda: True)  # the backend "triton" runs CPU tensors
    monkeypatch.setattr(config, "architecture", lambda device: target)
    monkeypatch.setattr(config, "processors", lambda device: 4)
    monkeypatch.setattr(judge, "watched", record.checked)
    report = request.config.getoption("--report")
    watch = record.launched if report else None
    monkeypatch.setattr(cuda_launch, "watched", watch)
    counted = not request.config.getoption("--few")
    with Unwritten(), on_the_machine(target, Mode(**ORDERS[order]), watch, counted):
        yield
    if report and record.launches:
        line = dict(test=request.node.nodeid, target=target, order=order, worst=record.worst,
                    launches=record.launches)  # fmt: skip
        with open(Path(report) / f"{os.getpid()}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
