"""Two processes on gloo, under DDP (no parameter unused) and FSDP2: the losses of one."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import pelt_fast
from pelt_fast.formats.training_state import load_trained, save_trained
from pelt_fast.layouts.lookup import base_of, find, stacks_of
from tests.models.judge import assert_near, exactly
from tests.parity.grid import past_budget
from tests.small import MODELS, inputs, randomise

STEPS, RATE = 3, 0.1


def batches(model) -> list[dict]:
    torch.manual_seed(11)
    return [inputs(model, batch=4) for _ in range(STEPS)]


def built(architecture: str, method: str, pack: bool = True):
    torch.manual_seed(0)
    model = MODELS[architecture](dropout=0.0)
    config = pelt_fast.methods()[method].replace(size=4, dropout=0.0)
    return randomise(pelt_fast.inject(model, config, pack=pack)).train()


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


def sharded(model, size: int = 2):
    """Each layer, then what is left."""
    mesh = init_device_mesh("cpu", (size,))
    for stack in stacks_of(model):
        for layer in find(base_of(model), stack.layers):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPED = {"ddp": DistributedDataParallel, "fsdp2": sharded}


def worker(rank: int, port: int, how: str, architecture: str, method: str, folder: str) -> None:
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = built(architecture, method, pack=how == "ddp")
    half = [
        {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
        for batch in batches(model)
    ]

    def mean(loss):
        dist.all_reduce(loss)
        return loss / 2

    found = steps(WRAPPED[how](model), half, mean)
    if rank == 0 or how == "fsdp2":  # what is sharded is gathered by both
        pelt_fast.save(model, folder)
    if rank == 0:
        torch.save(found, os.path.join(folder, "losses.pt"))
    dist.destroy_process_group()


def evaluator(rank: int, port: int, folder: str) -> None:
    """A model whose in-projections were packed before it was sharded."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = sharded(dropping())
    with torch.no_grad():
        logits = [model(**batch).logits for batch in batches(model)]
    if rank == 0:
        torch.save(logits, os.path.join(folder, "logits.pt"))
    dist.destroy_process_group()


def dropping():
    """With an output dropout of the model's own, only the in-projection is packed."""
    torch.manual_seed(0)
    config = pelt_fast.methods()["scaled_parallel_adapter"].replace(size=4)
    return randomise(pelt_fast.inject(MODELS["bart"](dropout=0.1), config)).eval()


def storer(rank: int, size: int, port: int, folder: str, write: bool) -> None:
    """Write what trains from ``size`` processes, or read it there, and train on."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    model = sharded(built("llama", "mam", pack=False), size)
    options = StateDictOptions(ignore_frozen_params=True)
    given = batches(model)
    mine = [{n: v[rank * 4 // size : (rank + 1) * 4 // size] for n, v in b.items()} for b in given]

    def mean(loss):
        dist.all_reduce(loss)
        return loss / size

    if write:
        steps(model, mine[:2])
        checkpoint.save(get_model_state_dict(model, options=options), checkpoint_id=folder)
    else:
        state = get_model_state_dict(model, options=options)
        checkpoint.load(state, checkpoint_id=folder)
        set_model_state_dict(model, state, options=StateDictOptions(strict=False))
        found = steps(model, mine[2:], mean)
        if rank == 0:
            torch.save(found, os.path.join(folder, f"losses-{size}.pt"))
    dist.destroy_process_group()


def refused(rank: int, port: int, folder: str) -> None:
    """What inject says of a model sharded by a tensor-parallel plan, and by FSDP2."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    said = []
    for shard in (tensor_parallel, sharded):
        try:
            pelt_fast.inject(shard(MODELS["llama"](dropout=0.0)), "lora")
        except ValueError as error:
            said.append(str(error))
    if rank == 0:
        torch.save(said, os.path.join(folder, "said.pt"))
    dist.destroy_process_group()


def tensor_parallel(model):
    """transformers' own plan for the model."""
    mesh = init_device_mesh("cpu", (2,))
    plan = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    styles = {n: plan[s]() for n, s in model.config.base_model_tp_plan.items() if s in plan}
    parallelize_module(base_of(model), mesh, styles)
    return model


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_two(how: str, architecture: str, method: str, folder) -> list[float]:
    arguments = (free_port(), how, architecture, method, str(folder))
    multiprocessing.spawn(worker, arguments, nprocs=2)
    return torch.load(folder / "losses.pt")


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("how, architecture, method", [
    ("ddp", "bart", "mam"), ("ddp", "llama", "lora_ffn"), ("fsdp2", "bart", "mam"),
    ("fsdp2", "llama", "lora"),
])  # fmt: skip
def test_two_processes_train_and_save_as_one(how, architecture, method, tmp_path):
    both = run_two(how, architecture, method, tmp_path)
    pack = how == "ddp"
    model = built(architecture, method, pack)
    alone = steps(model, batches(model))
    assert both == pytest.approx(alone, rel=1e-5)
    assert alone[-1] != alone[0]
    pelt_fast.save(model, tmp_path / "alone")
    files = [folder / "pelt_model.safetensors" for folder in (tmp_path, tmp_path / "alone")]
    found, wanted = map(load_file, files)
    exact = built(architecture, method, pack).double()
    steps(exact, batches(exact))
    pelt_fast.save(exact, tmp_path / "exact")
    miss = past_budget(found, wanted, load_file(tmp_path / "exact" / "pelt_model.safetensors"))
    assert miss is None, miss
    torch.manual_seed(0)
    plain = MODELS[architecture](dropout=0.0)
    pelt_fast.load(plain, tmp_path)  # a sharded model's is a checkpoint like any other


def going_on(rank: int, port: int, folder: str) -> None:
    """What trains, written from shards and read back into shards that a forward has gathered."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = sharded(built("bart", "mam", pack=False)).eval()
    batch = batches(model)[0]
    with torch.no_grad():
        before = model(**batch).logits
        save_trained(model, folder)
        dist.barrier()
        for name, parameter in model.named_parameters():
            if "pelt_" in name:
                parameter.zero_()
        model(**batch)
        load_trained(model, folder)
        after = model(**batch).logits
        for layer in model.modules():
            if hasattr(layer, "reshard"):
                layer.reshard()
        again = model(**batch).logits
    if rank == 0:
        torch.save([before, after, again], os.path.join(folder, "logits.pt"))
    dist.destroy_process_group()


def test_shards_go_on_from_what_they_wrote(tmp_path):
    multiprocessing.spawn(going_on, (free_port(), str(tmp_path)), nprocs=2)
    before, after, again = torch.load(tmp_path / "logits.pt")
    assert torch.equal(before, after) and torch.equal(before, again)


def test_weights_that_are_to_be_sharded_are_left_where_they_are():
    packed, own = (built("bart", "scaled_parallel_adapter", pack=pack) for pack in (True, False))
    held = [[site.module.is_packed for site in m._pelt.sites] for m in (packed, own)]
    assert all(held[0]) and not any(held[1])
    batch = batches(own)[0]
    exact = exactly(own, batch)["logits"]
    assert_near(packed(**batch).logits, own(**batch).logits, exact)
    assert not any(site.module.is_packed for site in own._pelt.sites)


def test_what_was_packed_before_it_was_sharded_is_not_packed_again(tmp_path):
    multiprocessing.spawn(evaluator, (free_port(), str(tmp_path)), nprocs=2)
    model = dropping()
    with torch.no_grad():
        alone = [model(**batch).logits for batch in batches(model)]
    exact = [exactly(model, batch)["logits"] for batch in batches(model)]
    for found, same, wanted in zip(torch.load(tmp_path / "logits.pt"), alone, exact, strict=True):
        assert_near(found, same, wanted)


def test_a_checkpoint_of_one_world_size_loads_in_another(tmp_path):
    folder = str(tmp_path)
    multiprocessing.spawn(storer, (2, free_port(), folder, True), nprocs=2)
    for size in (1, 2):
        multiprocessing.spawn(storer, (size, free_port(), folder, False), nprocs=size)
    one, two = (torch.load(tmp_path / f"losses-{size}.pt") for size in (1, 2))
    model = built("llama", "mam", pack=False)
    unbroken = steps(model, batches(model))[2:]
    assert one == pytest.approx(unbroken, rel=1e-5) and two == pytest.approx(unbroken, rel=1e-5)


def test_weights_sharded_before_are_refused_with_the_reason(tmp_path):
    multiprocessing.spawn(refused, (free_port(), str(tmp_path)), nprocs=2)
    said = torch.load(tmp_path / "said.pt")
    assert len(said) == 2 and all("is sharded already (S" in line for line in said)
    assert all("A tensor-parallel plan is not supported" in line for line in said)
