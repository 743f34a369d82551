"""torch.compile of whole models: one graph, none more than the plain model has for new shapes."""

import shutil
import warnings

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import pelt_fast
from tests.models.judge import assert_near, exactly
from tests.models.test_parity import assert_close, outputs_and_gradients, small_method
from tests.small import MODELS, gradients, inputs, randomise

SHAPES = [(3, 9), (4, 12), (2, 7), (5, 16)]  # batch, length


def compiled(model) -> tuple:
    """The model, compiled as one graph, and the list its graphs are counted in."""
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    return torch.compile(model, backend=counting, fullgraph=True, dynamic=True), graphs


def built(architecture: str, method: str | None):
    torch.manual_seed(0)
    model = MODELS[architecture](dropout=0.0)
    if method is not None:
        randomise(pelt_fast.inject(model, small_method(method, dropout=0.0)))
    return model.train()


def counts(model) -> list[int]:
    """Graphs after each shape."""
    run, graphs = compiled(model)
    found = []
    for batch, length in SHAPES:
        run(**inputs(model, batch=batch, length=length)).loss.backward()
        found.append(len(graphs))
    return found


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("architecture", ["roberta", "llama", "bart"])
def test_a_method_adds_no_graph_and_no_recompilation(architecture):
    plain = counts(built(architecture, None))
    for method in ("lora", "mam"):
        assert counts(built(architecture, method)) == plain, method


@pytest.mark.parametrize("method", ["mam", "lora"])
def test_tracing_says_nothing_of_our_code(method, monkeypatch):
    torch.manual_seed(0)
    model = MODELS["bart"](dropout=0.1)
    pelt_fast.inject(model, small_method(method, dropout=0.1)).train()
    # torch says each thing once in a process
    monkeypatch.setattr(torch._dynamo.utils, "warn_once_cache", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run, _ = compiled(model)
        run(**inputs(model, batch=2, length=6)).loss.backward()
    assert not [str(each.message) for each in said if "pelt_fast" in str(each.message)]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("architecture, method", [
    ("llama", "mam"), ("bart", "prefix"), ("roberta", "lora_ffn"),
])  # fmt: skip
def test_one_compiled_graph_gives_the_eager_gradients_of_other_shapes(architecture, method):
    model = built(architecture, method)
    run, _ = compiled(model)
    for batch, length in SHAPES:
        given = inputs(model, batch=batch, length=length)
        logits, expected = outputs_and_gradients(model, given)
        model.zero_grad()
        out = run(**given)
        out.loss.backward()
        assert_near(out.logits, logits, exactly(model, given)["logits"])
        assert_close(gradients(model), expected, 1e-3)


@pytest.mark.quick(every=3)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("architecture, method", [
    ("roberta", "mam"), ("llama", "lora"), ("bart", "houlsby"),
])  # fmt: skip
def test_inductor_gives_the_eager_numbers(architecture, method):
    model = built(architecture, method)
    given = inputs(model)
    logits, expected = outputs_and_gradients(model, given)
    model.zero_grad()
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True)(**given)
    out.loss.backward()
    assert_near(out.logits, logits, exactly(model, given)["logits"])
    assert_close(gradients(model), expected, 1e-3)


def host_questions(graph) -> int:
    """How often a graph waits for a number on the host (transformers' own norms do: epsilon)."""
    names = [str(node.target) for node in graph.graph.nodes]
    return sum(name == "item" or "_local_scalar_dense" in name for name in names)


@pytest.mark.quick(every=2)
@pytest.mark.parametrize("architecture, method", [("llama", "lora"), ("roberta", "mam")])
def test_dropout_draws_its_seed_in_the_graph_and_never_asks_the_host(architecture, method):
    """What a CUDA graph replays must draw again: the seed is a tensor the graph makes."""
    torch.manual_seed(0)
    model = randomise(
        pelt_fast.inject(MODELS[architecture](dropout=0.0), small_method(method, dropout=0.5))
    ).train()
    run, graphs = compiled(model)
    given = inputs(model)
    for _ in range(2):  # the first forward sets RoBERTa's problem_type
        run(**given)
    once = len(graphs)
    first, second = (run(**given).logits.detach() for _ in range(2))
    assert len(graphs) == once and not torch.equal(first, second)
    plain, without = compiled(built(architecture, None))
    plain(**given)
    assert host_questions(graphs[-1]) == host_questions(without[-1])
    torch.manual_seed(7)
    again = run(**given).logits.detach()
    torch.manual_seed(7)
    assert torch.equal(run(**given).logits.detach(), again)
