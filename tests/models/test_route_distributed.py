"""Several methods under DDP: each process has rows under other methods, and trains as one does."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import pelt_fast
from tests.models.test_distributed import RATE, batches, free_port
from tests.small import MODELS, randomise

METHODS = {"a": "mam", "b": "lora", "c": "prompt", "d": "bitfit", "e": "houlsby"}
# of the four rows of each step's batch; the first two are those of the first process
ROUTES = [
    ["a", "a", "b", None],
    ["c", "d", "e", "e"],
    [None, None, "d", "a"],
]


def built(architecture: str):
    torch.manual_seed(0)
    model = MODELS[architecture](dropout=0.0)
    methods = {
        name: preset
        if preset == "bitfit"
        else pelt_fast.methods()[preset].replace(size=4, dropout=0.0)
        for name, preset in METHODS.items()
    }
    return randomise(pelt_fast.inject_named(model, methods, together=True)).double().train()


def routed(model, wrapped, rows: slice, mean=lambda loss: loss) -> list[float]:
    """A step of plain SGD for each of ROUTES; the losses."""
    found = []
    for routes, batch in zip(ROUTES, batches(model)):
        with pelt_fast.route(model, routes[rows]):
            loss = wrapped(**{name: value[rows] for name, value in batch.items()}).loss
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                    parameter.grad = None
        found.append(mean(loss.detach()).item())
    return found


def worker(rank: int, port: int, architecture: str, folder: str) -> None:
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = built(architecture)

    def mean(loss):
        dist.all_reduce(loss)
        return loss / 2

    found = routed(model, DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2), mean)
    if rank == 0:
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        torch.save((found, trained), os.path.join(folder, "trained.pt"))
    dist.destroy_process_group()


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("architecture", ["bart", "roberta"])
def test_two_processes_train_several_methods_as_one_does(architecture, tmp_path):
    multiprocessing.spawn(worker, (free_port(), architecture, str(tmp_path)), nprocs=2)
    losses, trained = torch.load(tmp_path / "trained.pt")
    model = built(architecture)
    assert losses == pytest.approx(routed(model, model, slice(None)), rel=1e-11)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained.pop(name), parameter.detach(), rtol=1e-9, atol=1e-12)
    assert not trained
