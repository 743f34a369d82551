"""A block that leaves a model and the random states unchanged."""

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch
from torch import nn

from .repacking import no_repacking


@contextlib.contextmanager
def unchanged(model: nn.Module, training: bool) -> Iterator[None]:
    """In this block every module is in one mode, and the random states are seeded. Afterwards
    modes, buffers, random states and the form of quantised weights are those from before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    states = random.getstate(), numpy.random.get_state()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)), no_repacking(model):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        for module in modes:
            module.training = training
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            for module, mode in modes.items():
                module.training = mode
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer  # a forward may have put another there
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
