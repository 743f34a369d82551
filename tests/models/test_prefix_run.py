"""The prefix of one forward: every layer reads its slice, and the gradients meet once."""

import torch

from pelt_fast.modules.prefix_run import PrefixRun

LAYERS = 3


def test_the_gradients_of_all_layers_meet_in_one_node():
    values = torch.randn(LAYERS, 2, 2, 5, 4, requires_grad=True)
    run = PrefixRun(values)
    slices = [part for index in range(LAYERS) for part in run.layer(index)]
    assert len({part.grad_fn for part in slices}) == 1
    weights = torch.randn_like(values)
    sum((part * w).sum() for part, w in zip(slices, weights.flatten(0, 1))).backward()
    assert torch.equal(values.grad, weights)


def test_a_layer_that_ran_without_autograd_leaves_the_graph_of_the_next():
    values = torch.randn(LAYERS, 2, 2, 5, 4, requires_grad=True)
    with torch.no_grad():
        run = PrefixRun(values)
        assert run.layer(0)[0].grad_fn is None
    assert run.layer(0)[0].grad_fn is not None
