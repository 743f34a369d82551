"""Prefix tuning by concatenation: [prefix; K] and [prefix; V] are copied together and go through
SDPA with a mask, as in PEFT's prefix tuning."""

from collections.abc import Iterator

from benchmarks.problems import Problem, Provider
from benchmarks.subjects import concatenated, prefix_mask

NAME = "concatenation + SDPA"


def layer(problem: Problem) -> Iterator[Provider]:
    """The mask is built once, outside, as transformers does for a whole model."""
    if not problem.subject.startswith("prefix"):
        return
    mask = prefix_mask(problem, problem.frozen)
    yield Provider(
        NAME, lambda q, k, v: concatenated(q, k, v, *problem.trained.values(), mask),
        problem.trained,
    )  # fmt: skip
