"""`pelt-fast` in two CPU processes, under DDP or accelerate's FSDP2."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import multiprocessing

from pelt_fast import cli
from tests.models.test_distributed import free_port


def fsdp2(layer: str) -> dict[str, str]:
    """The environment in which accelerate cuts each ``layer`` with FSDP2."""
    return dict(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_TRANSFORMER_CLS_TO_WRAP=layer,
    )  # fmt: skip


def worker(rank: int, port: int, trainer: type, environment: dict, arguments: list[str]) -> None:
    """One process. accelerate cuts on GPUs alone, so it is told that two CPU processes are some."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **environment,
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    made = trainer.create_accelerator_and_postprocess

    def on_gpus(self):
        if environment:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        made(self)
        assert self.is_fsdp_enabled == bool(environment)

    trainer.create_accelerator_and_postprocess = on_gpus
    assert cli.main(arguments) == 0
    torch.distributed.destroy_process_group()


def run(trainer: type, environment: dict, arguments: list[str]) -> None:
    """Run a command in both processes; ``trainer`` is the class that trains in it."""
    multiprocessing.spawn(worker, (free_port(), trainer, environment, arguments), nprocs=2)
