"""Attentions that a module computes itself: torch's scaled_dot_product_attention, or a product, a
softmax of it, and a product with the values."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .walk import back

_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.einsum)
_ADDED = (torch.baddbmm, Tensor.baddbmm)
_SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)

# query, key and value, what the attention made of them, and its weights or None
Tell = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool], None]


class Computed(TorchFunctionMode):
    """Tells each attention that is computed while it is on."""

    def __init__(self, tell: Tell):
        super().__init__()
        self._tell = tell
        self.is_paused = False  # inside the attention interface, which is told there
        # by what made the result: the two factors; query, key and weights
        self._products: dict[object, tuple[Tensor, ...]] = {}
        self._weights: dict[object, tuple[Tensor, ...]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if self.is_paused or not isinstance(output, Tensor) or output.grad_fn is None:
            return output
        if function is F.scaled_dot_product_attention:
            self._direct(args, kwargs, output)
        elif function in _PRODUCTS or function in _ADDED:
            given = (*args, *kwargs.values())
            tensors = [each for each in given if isinstance(each, Tensor)][function in _ADDED :]
            if len(tensors) == 2:
                self._product(*tensors, output)
        elif function in _SOFTMAX:
            self._softmax(args[0] if args else kwargs["input"], output)
        return output

    def _direct(self, args: tuple, kwargs: dict, output: Tensor) -> None:
        given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args))
        given |= kwargs
        mask, causal = given.get("attn_mask"), bool(given.get("is_causal", False))
        weights = None if mask is None else seen_by(mask)
        self._tell(given["query"], given["key"], given["value"], output, weights, causal)

    def _product(self, one: Tensor, two: Tensor, output: Tensor) -> None:
        # no other product may be between the weights and this one
        found = _nearest(one, self._products | self._weights)
        if len(found) == 1 and len(found[0]) == 3:
            query, key, weights = found[0]
            self._tell(query, key, two, output, weights, False)
        self._products[output.grad_fn] = one, two

    def _softmax(self, scores: Tensor, output: Tensor) -> None:
        found = _nearest(scores, self._products | self._weights)
        if len(found) == 1 and len(found[0]) == 2 and output.dim() >= 3:
            self._weights[output.grad_fn] = (*found[0], output)


def _nearest(tensor: Tensor, stations: dict) -> list:
    """The stations that are met first on every way back from a tensor."""
    return [stations[node] for node in back(tensor.grad_fn, stations) if node in stations]


def seen_by(mask: Tensor) -> Tensor:
    """Which keys a mask lets a query see."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
