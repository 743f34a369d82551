"""A method whose update is zero for the time of a block: the model then computes the same as its
base."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pelt_fast.modules import ParallelFFNAdapter, PrefixBank, Prompt
from pelt_fast.modules.prefix_run import AttentionSlice

from .attention_interface import SLICE
from .record import Site

_UPDATES = ("lora_b", "up_weight", "up_bias")  # the tensors that are set to zero


@contextlib.contextmanager
def zero_update(sites: list[Site], training: bool) -> Iterator[None]:
    """In this block every site adds zero. In evaluation mode the sites run their usual code. In
    training mode a widened FFN runs its block alone, because its op would draw its own masks.
    """
    with contextlib.ExitStack() as guards:
        for module in dict.fromkeys(site.module for site in sites):
            _zero_tensors(module, guards)
            if getattr(module, "residual", True) is False:
                _set_for_now(module, "residual", True, guards)
            widens = isinstance(module, ParallelFFNAdapter)
            if widens and (training or module.why_not_fused() is not None):
                _set_for_now(module, "merged", True, guards)
        for site in sites:
            module = site.details.get("attention")
            if module is not None:
                form = site.details["slice"].form
                empty = None if training else _EmptySlice(site.module, form)
                _set_for_now(module, SLICE, empty, guards)
        yield


class _EmptySlice(AttentionSlice):
    """Used instead of a prefix: one key whose value is zero, added to the attention's output."""

    composition = "add"

    def __init__(self, site: nn.Module, form: str):
        self.form, like = form, next(site.parameters())
        heads, _, dim = site.shape[2:] if isinstance(site, PrefixBank) else site.down_weight.shape
        self.zeros = like.new_zeros(heads, 1, dim)

    def __call__(self, scaling: float) -> tuple[Tensor, Tensor]:
        return self.zeros, self.zeros


@torch.no_grad()
def _zero_tensors(module: nn.Module, guards: contextlib.ExitStack) -> None:
    if isinstance(module, Prompt):
        nothing = nn.Parameter(module.embedding.detach()[:0], module.embedding.requires_grad)
        _set_for_now(module, "embedding", nothing, guards)
    names = _UPDATES if getattr(module, "layer_norm", "") != "out" else (*_UPDATES, "norm_bias")
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is not None:
            guards.callback(_write, tensor, tensor.detach().clone())
            tensor.zero_()


@torch.no_grad()
def _write(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)


def _set_for_now(owner, name: str, value, guards: contextlib.ExitStack) -> None:
    """Set an attribute until the guards are closed."""
    before = getattr(owner, name)
    if name in vars(owner) or name in owner._parameters:
        guards.callback(setattr, owner, name, before)
    else:
        guards.callback(delattr, owner, name)
    setattr(owner, name, value)
