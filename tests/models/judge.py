"""Whole models by the budget: at most twice as far from fp64 as PyTorch or the reference is."""

import copy

import torch
from torch import Tensor

import pelt_fast
from pelt_fast.testing import Tensors, compare
from tests.small import outputs_and_gradients


def assert_near(actual: Tensor, same: Tensor, exact: Tensor) -> None:
    """``actual`` within the budget that ``same``, of the same dtype, sets around ``exact``."""
    found = ({"y": t.detach()} for t in (actual, same, exact))
    verdict = compare(*found, actual.dtype)
    assert verdict.ok, verdict


def state(model) -> tuple:
    """What a refusal must leave as it is: values, what trains, every module's own attributes and
    hooks."""
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {
        name: (sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return values, [p.requires_grad for p in model.parameters()], modules


def assert_untouched(model, before: tuple) -> None:
    """The model is as :func:`state` found it, bit for bit."""
    (values, *rest), (same, *others) = before, state(model)
    assert others == rest
    assert same.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(same[name], value), name


def exactly(model, batch: dict) -> Tensors:
    """Logits and gradients of the reference in fp64, of the same dropout masks."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    with pelt_fast.backend("reference"):
        logits, grads = outputs_and_gradients(copy.deepcopy(model).double(), wide)
    return {"logits": logits, **grads}


def assert_fused_is_the_reference(model, batch: dict) -> None:
    """Output and every gradient of a model without dropouts of its own."""
    logits, grads = outputs_and_gradients(model, batch)
    with pelt_fast.backend("reference"):
        same, same_grads = outputs_and_gradients(model, batch)
    exact = exactly(model, batch)
    verdict = compare({"logits": logits, **grads}, {"logits": same, **same_grads}, exact,
                      logits.dtype)  # fmt: skip
    assert verdict.ok, verdict
