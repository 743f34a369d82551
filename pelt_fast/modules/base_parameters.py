"""The parameters of a module as the base had them, for the threads in which the method is off."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; a product may be rounded differently where its memory begins elsewhere


class BaseParameters(dict):
    """Stands in a module for its table of parameters.

    In a thread for which ``is_off`` is true ``instead[name]`` of the present parameter is found
    instead of it. Every other thread finds the parameter, and so does what goes through all of them
    (``named_parameters``, ``state_dict``).
    """

    def __init__(self, module: nn.Module, is_off: Callable[[], bool]):
        super().__init__()
        self.module, self.is_off, self.own = module, is_off, module._parameters
        self.instead: dict[str, Callable[[Tensor], Tensor]] = {}

    def __getitem__(self, name: str):
        found = super().__getitem__(name)
        value = self.instead.get(name)
        return found if value is None or not self.is_off() else value(found)

    def put(self) -> None:
        """Take the place of the module's own table."""
        self.own = self.module._parameters
        self.clear()
        self.update(self.own)
        self.module.__dict__["_parameters"] = self

    def give_back(self) -> None:
        """Give the module its own table back, with what was written here since."""
        self.own.clear()
        self.own.update(self)
        self.module.__dict__["_parameters"] = self.own


class Before:
    """The value from before the method. A hook that loads offloaded weights (``hooked``) makes the
    loaded one as it finds the present one: a parameter that trains or not."""

    def __init__(self, value: Tensor, hooked: bool):
        self.value, self.hooked = value, hooked

    def __call__(self, present: Tensor) -> Tensor:
        meta = present.device.type == "meta"
        value = self.value if meta else self.value.to(present.device)
        return nn.Parameter(value, present.requires_grad) if self.hooked else value


def in_own_memory(weight: Tensor) -> Tensor:
    """A weight as the base stores it: contiguous, at the start of its memory. One that is packed
    with a method's is copied."""
    if weight.is_contiguous() and weight.data_ptr() % ALIGNMENT == 0:
        return weight
    with torch.no_grad():
        return weight.clone(memory_format=torch.contiguous_format)
