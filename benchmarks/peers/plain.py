"""Plain PyTorch: the method as it is usually written, with torch's own dropout; the modules have
the trained dtype and are cast to the activation's."""

from collections.abc import Iterator

from benchmarks.problems import Problem, Provider, torchs_dropout
from benchmarks.whole import Trained, trainable

from .ours import OPS
from .plain_ops import as_plain

NAME = "plain PyTorch"


def layer(problem: Problem) -> Iterator[Provider]:
    """The definition itself, run by autograd. Prefixes: see concatenation.py."""
    if problem.subject.startswith("prefix"):
        return
    masks = torchs_dropout(problem.p)
    yield Provider(
        NAME,
        lambda *inputs: problem.expression(masks, inputs, problem.frozen, problem.trained),
        problem.trained,
    )


def model(base, config, injected) -> Iterator[Trained]:
    """The injected model with every op of ours written out in plain PyTorch."""
    if any(m.form in OPS for m in config.modifications):
        yield Trained(NAME, injected, trainable(injected), around=as_plain)
