"""While a model generates nothing trains or changes: each prefix is computed once for all steps,
and what the sites run is checked once."""

import contextlib
from collections.abc import Iterator

from torch import nn

from pelt_fast.modules import PrefixBank
from pelt_fast.modules.generation import one_generate

from .record import Injection


@contextlib.contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """In this block, forwards of this thread without autograd compute each prefix of ``model``
    once, and check once what its sites run. Nothing of the model may change in it. Nothing is kept
    afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_generate())
        for module in model.modules():
            if isinstance(module, PrefixBank):
                stack.enter_context(module.made_once())
        yield


class Generate:
    """The model's ``generate`` inside :func:`generating`. A wrapper's (PEFT's) calls it, too."""

    def __init__(self, model: nn.Module):
        self.model, self.before = model, model.__dict__.get("generate")

    def __call__(self, *args, **kwargs):
        inner = self.before
        if inner is None:
            inner = type(self.model).generate.__get__(self.model)
        with generating(self.model):
            return inner(*args, **kwargs)


def take_generate(model: nn.Module, injection: Injection) -> None:
    """Wrap ``model.generate``, if there is one."""
    if hasattr(type(model), "generate"):
        injection.changes.set(model, "generate", Generate(model), watched=False)
