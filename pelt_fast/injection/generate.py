"""What holds while a model generates: nothing trains, so that a prefix is made once for all
steps."""

import contextlib
from collections.abc import Iterator

from torch import nn

from pelt_fast.modules import PrefixBank

from .record import Injection


@contextlib.contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Inside, this thread's forwards without autograd make each prefix of ``model`` once: the
    weights must not change. Nothing of it outlives the block."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, PrefixBank):
                stack.enter_context(module.made_once())
        yield


class Generate:
    """A model's ``generate``, the one that was there, inside :func:`generating`. A wrapper's
    (PEFT's) comes by here as well."""

    def __init__(self, model: nn.Module):
        self.model, self.own = model, model.__dict__.get("generate")

    def __call__(self, *args, **kwargs):
        own = type(self.model).generate.__get__(self.model) if self.own is None else self.own
        with generating(self.model):
            return own(*args, **kwargs)


def take_generate(model: nn.Module, injection: Injection) -> None:
    """Let ``model`` say when it generates, where it can."""
    if hasattr(type(model), "generate"):
        injection.changes.set(model, "generate", Generate(model), watched=False)
