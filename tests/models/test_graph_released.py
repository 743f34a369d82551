"""Between two steps no graph is alive: a node that adds up a gradient would keep the stream of its
step, and a CUDA graph could then not capture the next one (tests/numerics/test_cuda_graphs.py)."""

import copy

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

import pelt_fast
from pelt_fast.layouts.lookup import base_of
from tests.models.test_parity import small_method
from tests.models.test_peft import prefix as peft_prefix
from tests.models.test_state import (
    EVERY,
    PREFIXES,
    assert_same,
    batches,
    built,
    gradients_of,
    squared,
)
from tests.small import MODELS, gradients, inputs, randomise

MARK = "pelt_fast: a node of this step"
REENTRANT = {"checkpointed": False, "reentrant": True}
MODES = ["plain", *REENTRANT]
TOGETHER = ("lora", "mam", "houlsby", "prefix_nomlp")


def in_mode(model, mode: str):
    """``model`` in training, its layers under a checkpoint of this kind."""
    if mode in REENTRANT:
        model.gradient_checkpointing_enable(dict(use_reentrant=REENTRANT[mode]))
        if REENTRANT[mode]:
            model.enable_input_require_grads()
    return model.train()


def marks(model) -> list[dict]:
    """Where each trained parameter's node can be marked: the same dict while the node lives, and
    one of a new node once it has died."""
    return [get_gradient_edge(p).node.metadata for p in model.parameters() if p.requires_grad]


def alive_after(model, step) -> int:
    """How many nodes of a step live after it. ``step`` is the forward, and returns the loss."""
    loss = step()
    found = marks(model)
    for metadata in found:
        metadata[MARK] = True
    del found, metadata
    loss.backward()
    del loss
    return sum(MARK in metadata for metadata in marks(model))


def assert_released(model, step) -> None:
    """Nothing of a step lives after it, and the step gave gradients."""
    assert alive_after(model, step) == 0
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("architecture, method, mode", [
    *((*pair, mode) for pair in EVERY for mode in MODES[:2]),
    *((*pair, "reentrant") for pair in PREFIXES),
])  # fmt: skip
def test_a_step_leaves_no_node_alive(architecture, method, mode):
    torch.manual_seed(0)
    model = randomise(pelt_fast.inject(MODELS[architecture](), small_method(method)))
    batch = inputs(in_mode(model, mode))
    assert_released(model, lambda: model(**batch).loss)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ["bart", "llama", "roberta"])
def test_a_step_of_several_methods_leaves_no_node_alive(architecture, mode):
    torch.manual_seed(0)
    model = MODELS[architecture]()
    methods = {name: small_method(name) for name in TOGETHER}
    randomise(pelt_fast.inject_named(model, methods, together=True))
    batch = inputs(in_mode(model, mode), batch=5)
    with pelt_fast.route(model, torch.tensor([0, 1, 2, 3, -1])):
        assert_released(model, lambda: model(**batch).loss)


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_step_of_peft_s_prefix_leaves_no_node_alive(mode):
    model = pelt_fast.accelerate_peft(peft_prefix()).train()
    in_mode(model.get_base_model(), mode)
    batch = inputs(model.get_base_model())
    assert_released(model, lambda: model(**batch).loss)


@pytest.mark.parametrize("method", ["lora", "mam"])
def test_a_stack_that_a_checkpoint_breaks_off_leaves_no_node_alive(method):
    """A checkpoint without reentry stops its second run at the last tensor that it needs."""
    model = built("llama", method).train()
    batch = batches(model, 1)[0]
    ids, base = batch["input_ids"], base_of(model)

    def step():
        out = checkpoint(lambda: base(ids, use_cache=False)[0], use_reentrant=False)
        return out.pow(2).mean()

    assert_released(model, step)


def test_a_forward_that_fails_leaves_no_node_alive():
    model = built("llama", "prefix").train()
    batch = batches(model, 1)[0]

    def fail(*_):
        for metadata in marks(model):
            metadata[MARK] = True
        raise MemoryError

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(MemoryError):
        model(**batch)
    hook.remove()
    assert not any(MARK in metadata for metadata in marks(model))


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("method", ["prefix", "prefix_nomlp"])
@pytest.mark.parametrize("last_first", [False, True])
def test_one_of_two_checkpointed_forwards_is_gone_before_the_other(method, mode, last_first):
    model = built("llama", method).train()
    given = batches(model, 2)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = [gradients_of(squared(model(**batch)), weights) for batch in given]
    in_mode(model, mode)
    losses = {i: squared(model(**batch)) for i, batch in enumerate(given)}
    for i in (1, 0) if last_first else (0, 1):
        model.zero_grad()
        losses.pop(i).backward()
        assert_same(gradients(model), wanted[i])


def test_a_graph_that_is_kept_runs_its_checkpoints_again():
    model = built("bart", "mam").train()
    batch = batches(model, 1)[0]
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = gradients_of(squared(model(**batch)), weights)
    loss = squared(in_mode(model, "checkpointed")(**batch))
    for _ in range(2):
        model.zero_grad()
        loss.backward(retain_graph=True)
        assert_same(gradients(model), wanted)
    twin = copy.deepcopy(model)  # while the graph lives
    twin.zero_grad()
    squared(twin(**batch)).backward()
    assert_same(gradients(twin), wanted)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("method", ["mam", "prefix_lora_ffn"])
def test_a_frozen_prefix_acts_where_a_checkpoint_runs_again(method, mode):
    model = built("llama", method).train()
    model.model.pelt_decoder_prefix.requires_grad_(False)
    batch = batches(model, 1)[0]
    squared(model(**batch)).backward()
    wanted = gradients(model)
    model.zero_grad()
    squared(in_mode(model, mode)(**batch)).backward()
    assert_same(gradients(model), wanted)
