"""A captured training step: every replay draws its own dropout mask, the gradients of a replay are
those of its mask, and eager steps may come before; needs a GPU (make gpu PART=1 runs it)."""

import pytest
import torch

import pelt_fast
from tests.models.test_parity import assert_close, small_method
from tests.small import gradients, llama, randomise, roberta

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def captured(step, model):
    """A step of ``model`` as a graph, and what it returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is made once is made here
            model.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def trained(make, method: str, dropout: float):
    """A small model with a method, and its training step."""
    torch.manual_seed(0)
    model = make(dropout=0.0)
    if make is roberta:
        model.config.problem_type = "single_label_classification"
    randomise(pelt_fast.inject(model, small_method(method, dropout=dropout))).cuda().train()
    ids = torch.randint(4, 61, (3, 9), device="cuda")
    labels = torch.randint(0, 3, (3,), device="cuda") if make is roberta else ids

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        return loss

    return model, step


@pytest.mark.parametrize("method", ["lora", "scaled_parallel_adapter", "mam"])
@pytest.mark.parametrize("make", [llama, roberta], ids=["llama", "roberta"])
def test_replays_draw_anew_and_repeat_from_a_seed(make, method):
    model, step = trained(make, method, dropout=0.3)
    graph, loss = captured(step, model)

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


@pytest.mark.parametrize("method", ["lora", "mam", "prefix", "prefix_nomlp"])
@pytest.mark.parametrize("make", [llama, roberta], ids=["llama", "roberta"])
def test_a_step_is_captured_after_eager_steps_on_the_default_stream(make, method):
    """A node that adds up a gradient keeps the stream on which it was made: none of the eager steps
    may be alive."""
    model, step = trained(make, method, dropout=0.0)
    for _ in range(2):
        model.zero_grad()
        wanted = step().item()  # the loss itself is gone
    expected = gradients(model)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a stream of its own
        loss = step()
    for _ in range(2):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        graph.replay()
        torch.testing.assert_close(loss.item(), wanted)
        found = gradients(model)
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(found[name], grad, msg=name)


@pytest.mark.parametrize("make", [llama, roberta], ids=["llama", "roberta"])
def test_a_captured_step_reads_the_routes_that_are_written_later(make):
    torch.manual_seed(0)
    model = make(dropout=0.0)
    methods = {name: small_method(name) for name in ("lora", "mam", "houlsby")}
    pelt_fast.inject_named(model, methods, together=True)
    randomise(model).cuda().eval()
    ids = torch.randint(4, 61, (4, 9), device="cuda")
    routes = torch.tensor([0, 1, -1, 2], device="cuda")

    def step() -> torch.Tensor:
        logits = model(input_ids=ids).logits
        logits.square().sum().backward()
        return logits

    def taken() -> dict[str, torch.Tensor]:
        found = gradients(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        return found

    pelt_fast.route(model, routes)
    graph, logits = captured(step, model)
    taken()
    for new in ([2, 2, 0, 1], [-1, 0, -1, 1], [1, 1, 1, 1]):
        routes.copy_(torch.tensor(new))
        graph.replay()
        replayed, found = logits.clone(), taken()
        with pelt_fast.route(model, torch.tensor(new, device="cuda")):
            torch.testing.assert_close(replayed, step())
        for name, expected in taken().items():
            torch.testing.assert_close(found[name], expected, msg=name)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("method", ["lora", "mam"])
@pytest.mark.parametrize("make", [llama, roberta], ids=["llama", "roberta"])
def test_a_compiled_model_has_the_eager_gradients(make, method, mode):
    """torch.compile of the whole model; under "reduce-overhead" torch replays it as CUDA graphs."""
    model, step = trained(make, method, dropout=0.0)
    wanted = step().item()
    expected = gradients(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile(mode=mode)
    for _ in range(4):  # warm, recorded, replayed
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        loss = step().item()
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert_close(gradients(model), expected, 1e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
