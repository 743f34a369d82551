"""A training step of a whole model in bf16, forward and backward, with every kernel on the machine.

``pytest -p tests.ptx.plugin tests/ptx/model_step.py``; ``test_kernels.py`` runs it.
"""

import copy

import pytest
import torch

import pelt_fast
from tests import small
from tests.numerics.judge import check
from tests.ptx.triton_launch import executed

KERNELS = {
    "mam": {"prefix_fwd_kernel", "prefix_bwd_kernel", "widened_act_fwd_kernel", "widened_act_bwd_kernel"},
    "lora": {"rank_up_fwd_kernel", "rank_up_bwd_kernel"},
}  # fmt: skip


def step(model, inputs: dict, backend: str) -> dict[str, torch.Tensor]:
    """The loss and the gradients of one step."""
    model.zero_grad()
    with pelt_fast.backend(backend):
        loss = model(**inputs).logits.square().mean()
        loss.backward()
    return {"loss": loss.detach()} | small.gradients(model)


@pytest.mark.parametrize("architecture, method", [("bart", "mam"), ("llama", "lora")])
def test_the_loss_and_the_gradients_are_within_the_budget(architecture, method):
    # smooth: at a ReLU's corner two roundings differ by a whole row
    config = pelt_fast.methods()[method].replace(activation="tanh")
    model = small.MODELS[architecture]().bfloat16()
    small.randomise(pelt_fast.inject(model, config)).eval()
    inputs = small.inputs(model)
    executed.clear()
    ours = step(model, inputs, "triton")
    assert KERNELS[method] <= executed.keys(), executed
    same = step(model, inputs, "reference")
    exact = step(copy.deepcopy(model).double(), inputs, "reference")
    assert ours.keys() == exact.keys()
    for name, oracle in exact.items():
        check(ours[name], same[name], oracle, torch.bfloat16)
