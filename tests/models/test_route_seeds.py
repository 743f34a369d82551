"""A method with a seed of its own draws the masks that it draws alone, wherever its sites run."""

import pytest
import torch

import pelt_fast
from tests.models.test_route import three

ROUTES = ["b", "a", "c", "c", "a", "b"]
METHODS = [
    ("learned_scale_parallel_adapter", "houlsby", "lora"),  # the first runs by itself
    ("multi_head_parallel_adapter", "mam", "parallel_adapter_attn"),
]


@pytest.mark.parametrize("routes", [ROUTES, ["a"] * 3, ["b"] * 3, ["c"] * 3], ids="".join)
@pytest.mark.parametrize("names", METHODS, ids="+".join)
def test_sites_of_every_kind_draw_from_their_methods_generator(names, routes, tmp_path):
    several = three("bart", names, tmp_path, training=True)
    before = torch.get_rng_state()
    several.check(routes, seed=7)
    assert not torch.equal(before, torch.get_rng_state())  # the methods alone draw from torch's


@pytest.mark.parametrize("routes", [["a"] * 3, ["b"] * 3, ["c"] * 3, ROUTES], ids="".join)
def test_lora_on_an_ffn_that_another_method_runs_as_a_block(routes, tmp_path):
    three("bart", ("lora_ffn", "mam", "houlsby"), tmp_path, training=True).check(routes, seed=7)


@pytest.mark.parametrize("routes", [ROUTES, ["a"] * 6], ids="".join)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_masks_again(reentrant, routes, tmp_path):
    several = three("bart", ("lora", "mam", "houlsby"), tmp_path, training=True)
    model, batch = several.model, several.batch(6)

    def gradients() -> dict:
        model.zero_grad()
        several._seed(7)
        with pelt_fast.route(model, routes):
            (model(**batch).logits ** 2).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    found = gradients()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
