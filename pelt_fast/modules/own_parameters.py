"""Task heads and biases of several methods: each row of a batch runs with those of its method."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .methods import Methods
from .routing import Routes

_ADDS_BIAS = (nn.Linear, Conv1D, nn.LayerNorm)


class OwnParameters(nn.Module):
    """The parameters that one method has instead of a module's, by their names there."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.detach().clone()))


class RoutedOwn(Methods):
    """Runs the forward of a module with the parameters of each row's method."""

    def run(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        """The output of ``module``, whose own forward is ``forward``."""
        routes = self.routing.now()
        if self.switch.any_block and self.switch.is_off():
            return forward(*args, **kwargs)
        if routes.alone is not None:
            own = self.of(routes.alone)
            return forward(*args, **kwargs) if own is None else _with(module, own, args, kwargs)
        y = forward(*args, **kwargs)
        if type(module) in _ADDS_BIAS and self._are_biases:
            return y + self._bias_rows(module.bias, routes, y)
        return self._by_method(module, routes, y, args, kwargs)

    @property
    def _are_biases(self) -> bool:
        return all(list(own._parameters) == ["bias"] for own in self._modules.values())

    def _bias_rows(self, bias: Tensor, routes: Routes, y: Tensor) -> Tensor:
        """b_g - b of the method of each row."""
        changes = [torch.zeros_like(bias)] * (self.routing.count + 1)  # the last one: of none
        for method, own in self.sites.items():
            changes[method] = own.bias.to(bias.dtype) - bias
        rows = torch.stack(changes)[routes.of(y.shape[0], y.device)]
        return rows.view(y.shape[0], *(1,) * (y.dim() - 2), y.shape[-1]).to(y.dtype)

    def _by_method(
        self, module: nn.Module, routes: Routes, y: Tensor, args: tuple, kwargs: dict
    ) -> Tensor:
        count, dtype, acting = y.shape[0], y.dtype, self.acting(routes)
        width = y.shape[-1] + max((_more_classes(module, own) for _, own in acting), default=0)
        y = _widened(y, width)
        for method, own in acting:

            def compute(rows: Tensor | slice, own=own) -> Tensor:
                part = tuple(_rows_of(value, rows, count) for value in args)
                named = {key: _rows_of(value, rows, count) for key, value in kwargs.items()}
                return _widened(_with(module, own, part, named), width).to(dtype)

            y = routes.put(method, y, compute)
        return y


def _more_classes(module: nn.Module, own: OwnParameters) -> int:
    """How many classes more than ``module`` a method has; 0 if fewer, or if it gives no classes."""
    weight = own._parameters.get("weight")
    return 0 if weight is None else max(0, weight.shape[0] - module.weight.shape[0])


def _widened(y: Tensor, width: int) -> Tensor:
    """``y`` with -inf in place of the classes that its method does not have."""
    lacking = width - y.shape[-1]
    return F.pad(y, (0, lacking), value=-torch.inf) if lacking else y


def _rows_of(value, rows: Tensor | slice, count: int):
    """The rows of an argument that has ``count`` of them."""
    of_batch = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
    return value[rows] if of_batch else value


def _with(module: nn.Module, own: OwnParameters, args: tuple, kwargs: dict):
    """The class's forward of ``module`` with other parameters."""
    stand_in = copy.copy(module)
    stand_in.__dict__["_parameters"] = {**module._parameters, **own._parameters}
    return type(module).forward(stand_in, *args, **kwargs)
