"""torch.compile, of the definition and of PEFT's layers, for the one shape."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.problems import Absent, Problem, Provider, torchs_dropout
from benchmarks.whole import Trained

from . import peft

NAME = "torch.compile"


def layer(problem: Problem) -> Iterator[Provider | Absent]:
    """Both with inductor's defaults."""
    masks = torchs_dropout(problem.p)

    def definition(*inputs):
        return problem.expression(masks, inputs, problem.frozen, problem.trained)

    yield Provider(NAME, torch.compile(definition, dynamic=False), problem.trained, opaque=True)
    if problem.subject.startswith("LoRA"):
        name = f"{NAME}(PEFT)"
        try:
            eager = peft.linears(name, problem, problem.dtype)
        except ImportError as error:
            yield Absent(name, str(error))
            return
        yield replace(eager, call=torch.compile(eager.call, dynamic=False), opaque=True)


def model(base, config, injected) -> Iterator[Trained | Absent]:
    """PEFT's model compiled, where PEFT has the method."""
    for eager in peft.model(base, config, injected):
        name = f"{NAME}({eager.name})"
        if isinstance(eager, Absent):
            yield replace(eager, name=name)
        else:
            yield replace(eager, name=name, model=torch.compile(eager.model), opaque=True)
