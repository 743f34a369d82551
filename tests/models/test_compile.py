"""torch.compile of whole models: one graph, none more than the plain model has for new shapes."""

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


@pytest.mark.parametrize("architecture", ["roberta", "llama", "bart"])
def test_a_method_adds_no_graph_and_no_recompilation(architecture):
    plain = counts(built(architecture, None))
    for method in ("lora", "mam"):
        assert counts(built(architecture, method)) == plain, method


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
