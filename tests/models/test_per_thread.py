"""A value of one forward: each thread's own, never copied, and no graph break."""

import copy
import pickle

import torch

from pelt_fast.modules.per_thread import PerThread
from tests.threads import in_a_thread


def test_a_value_is_seen_by_the_thread_that_put_it_alone():
    held = PerThread()
    held.put("mine")
    assert in_a_thread(held.get) is None
    in_a_thread(lambda: held.put("other"))
    assert held.get() == "mine" and held.take() == "mine" and held.get() is None


def test_copies_and_pickles_are_empty_and_stay_one_where_they_were_one():
    held = PerThread()
    held.put(torch.ones(1, requires_grad=True) * 2)  # not a leaf: torch copies none
    for again in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        first, second = again([held, held])
        assert first is second and first.get() is None
        first.put(1)
        assert held.get() is not None and second.take() == 1


def test_a_compiled_forward_puts_and_takes_in_one_graph():
    held, graphs = PerThread(), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=counting, fullgraph=True)
    def forward(x):
        held.put(x * 2)
        return held.get() + held.take()

    for _ in range(2):
        assert torch.equal(forward(torch.ones(3)), torch.full((3,), 4.0))
    assert len(graphs) == 1 and held.get() is None
