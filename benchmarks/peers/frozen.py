"""The frozen layer: the floor of every method's cost."""

from collections.abc import Iterator

from benchmarks.problems import Problem, Provider
from benchmarks.whole import Trained

NAME = "frozen"


def layer(problem: Problem) -> Iterator[Provider]:
    """The layer without the method."""
    yield Provider(NAME, lambda *inputs: problem.floor(inputs, problem.frozen), {})


def model(base, config, injected) -> Iterator[Trained]:
    """The model without a method, forward and backward to the embeddings: the floor of a method
    that trains the first layer."""
    yield Trained(NAME, base, None, to_embeddings=True)
