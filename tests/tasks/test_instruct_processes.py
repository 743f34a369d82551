"""The task instruct on two processes: DDP and accelerate's FSDP2 give the same scores, the first
process writes, and a plain model takes the method."""

import json
import os

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import multiprocessing
from transformers import AutoModelForCausalLM, Trainer

import pelt_fast
from pelt_fast import cli
from pelt_fast.tasks.instruct.generations import FILE
from pelt_fast.tasks.meter import LOG
from tests.models.test_distributed import free_port
from tests.tasks import chat

pytest.importorskip("trl")
FSDP2 = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_TRANSFORMER_CLS_TO_WRAP="LlamaDecoderLayer",
)  # fmt: skip


def worker(rank: int, port: int, environment: dict, arguments: list[str]) -> None:
    """One process. accelerate cuts on GPUs alone, so it is told that two CPU processes are some."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **environment,
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    made = Trainer.create_accelerator_and_postprocess

    def on_gpus(self):
        if environment:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        made(self)
        assert self.is_fsdp_enabled == bool(environment)

    Trainer.create_accelerator_and_postprocess = on_gpus
    assert cli.main(arguments) == 0
    torch.distributed.destroy_process_group()


def trained(folder, model: str, data, environment: dict) -> tuple[list[float], int]:
    """The losses of the evaluations, and how many generations were written."""
    arguments = ["train", "--task", "instruct", "--data", str(data), "--model", model, "--steps",
                 "4", "--max-length", "32", "--batch-size", "1", "--accumulation", "1",
                 "--evaluate-every", "2", "--max-generated", "4", "--output", str(folder),
                 "--set", "dropout=0.0", "--learning-rate", "0.01"]  # fmt: skip
    multiprocessing.spawn(worker, (free_port(), environment, arguments), nprocs=2)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return losses, len((folder / FILE).read_text().splitlines())


def test_fsdp2_trains_as_ddp_and_the_first_process_writes(tmp_path):
    model = chat.model_folder(tmp_path / "model")
    rows = [*chat.ROWS["messages"], {"messages": chat.said("say more", "eeeeee")}]  # an odd number
    data = chat.write(tmp_path / "data", rows, repeat=4)
    wanted, spoken = trained(tmp_path / "ddp", model, data, {})
    assert len(wanted) == 3 and wanted[2] < wanted[1] and spoken == 12
    found, spoken = trained(tmp_path / "fsdp", model, data, FSDP2)
    assert found == pytest.approx(wanted, rel=1e-4) and spoken == 12
    for folder in ("ddp", "fsdp"):
        assert len((tmp_path / folder / "results.jsonl").read_text().splitlines()) == 1
        pelt_fast.load(AutoModelForCausalLM.from_pretrained(model), tmp_path / folder)
