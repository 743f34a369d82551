"""A captured training step: every replay draws its own dropout mask, and the gradients of a replay
are those of its mask; needs a GPU (make gpu PART=1 runs it)."""

import pytest
import torch

import pelt_fast
from tests.models.test_parity import small_method
from tests.small import llama, randomise, roberta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def captured(model, ids, labels):
    """A step of ``model`` as a graph, and its loss."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is made once is made here
            model.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
    return graph, loss


@pytest.mark.parametrize("method", ["lora", "scaled_parallel_adapter"])
@pytest.mark.parametrize("make", [llama, roberta], ids=["llama", "roberta"])
def test_replays_draw_anew_and_repeat_from_a_seed(make, method):
    torch.manual_seed(0)
    model = make(dropout=0.0)
    if make is roberta:
        model.config.problem_type = "single_label_classification"
    randomise(pelt_fast.inject(model, small_method(method, dropout=0.3))).cuda().train()
    ids = torch.randint(4, 61, (3, 9), device="cuda")
    labels = torch.randint(0, 3, (3,), device="cuda") if make is roberta else ids
    graph, loss = captured(model, ids, labels)

    def replay() -> tuple[float, list[torch.Tensor]]:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        graph.replay()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return loss.item(), grads

    first, second = replay()[0], replay()[0]
    assert first != second
    torch.cuda.manual_seed(7)
    one, grads = replay()
    torch.cuda.manual_seed(7)
    again, same = replay()
    assert one == again and all(torch.equal(a, b) for a, b in zip(grads, same))
    assert any(g.abs().sum() > 0 for g in grads)
