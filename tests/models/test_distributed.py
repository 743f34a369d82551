"""Two processes on gloo under DDP: the gradients and losses of one, no parameter unused."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import pelt_fast
from tests.small import MODELS, inputs, randomise

STEPS, RATE = 3, 0.1


def batches(model) -> list[dict]:
    torch.manual_seed(11)
    return [inputs(model, batch=4) for _ in range(STEPS)]


def built(architecture: str, method: str):
    torch.manual_seed(0)
    model = MODELS[architecture](dropout=0.0)
    config = pelt_fast.methods()[method].replace(size=4, dropout=0.0)
    return randomise(pelt_fast.inject(model, config)).train()


def steps(model, given: list[dict], mean=lambda loss: loss) -> list[float]:
    """Plain SGD; the losses."""
    found = []
    for batch in given:
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
        found.append(mean(loss.detach()).item())
    return found


def worker(rank: int, port: int, architecture: str, method: str, folder: str) -> None:
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = built(architecture, method)
    half = [
        {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
        for batch in batches(model)
    ]

    def mean(loss):
        dist.all_reduce(loss)
        return loss / 2

    found = steps(DistributedDataParallel(model), half, mean)
    if rank == 0:
        pelt_fast.save(model, folder)
        torch.save(found, os.path.join(folder, "losses.pt"))
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("architecture, method", [("bart", "mam"), ("llama", "lora_ffn")])
def test_two_processes_train_as_one(architecture, method, tmp_path):
    arguments = (free_port(), architecture, method, str(tmp_path))
    multiprocessing.spawn(worker, arguments, nprocs=2)
    model = built(architecture, method)
    alone = steps(model, batches(model))
    both = torch.load(tmp_path / "losses.pt")
    assert both == pytest.approx(alone, rel=1e-5)
    assert alone[-1] != alone[0]
    torch.manual_seed(0)
    loaded = pelt_fast.load(MODELS[architecture](dropout=0.0), tmp_path).eval()
    batch = batches(model)[0]
    with torch.no_grad():
        assert torch.allclose(loaded(**batch).logits, model.eval()(**batch).logits, atol=1e-4)
