"""route: which named method acts on each row of a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pelt_fast.modules.routing import NONE, Routes, Routing

from .together import together_of


class RouteBlock:
    """What :func:`route` returns: leaving it as a context restores the routes from before."""

    def __init__(self, model: nn.Module, routing: Routing, before: Routes | None):
        self.model, self.routing, self.before = model, routing, before

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_) -> None:
        self.routing.put(self.before)


def route(
    model: nn.Module,
    methods: str | Sequence[str | None] | Tensor | None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
) -> RouteBlock:
    """Choose the named method of each row of the batches that follow, in this thread.

    The rows of one batch run under different methods, or under none: every method trains on its own
    rows, with the gradients that it would have alone. Row i of a tensor with k B leading entries
    belongs to row i // k of the batch: beams and returned sequences keep the method of their row.
    Prompts of the batch's methods may have other lengths: the batch becomes as much longer as the
    longest of them, and the places that a row does not use are hidden from it.
    A checkpoint runs again in backward under the routes of its forward.

    Args:
        model: a model with named methods (:func:`pelt_fast.inject_named` with ``together=True``).
        methods: a name for each of the B rows, None for a row that the base alone answers; or one
            name for all rows; or an int64 tensor (B) of positions in ``inject_named``'s methods, -1
            for the base alone; or None: the active method (:func:`pelt_fast.set_active`) again. A
            tensor is read in each forward: it may be written in place.
        lengths: for a padding-free batch the number of tokens of each sequence; ``methods`` then
            has an entry for each sequence.

    Returns:
        A context manager that gives ``model``. The routes hold at once, and until the block ends;
        without a ``with`` until the next call in this thread.

    Raises:
        ValueError: an unknown name or position, an empty sequence, lengths that do not belong to
            ``methods``, or a model without methods that are in it together.
        TypeError: ``methods`` or ``lengths`` is of another type.

    Example:
        pelt_fast.inject_named(model, {"news": "lora", "mail": "mam"}, together=True)
        with pelt_fast.route(model, ["news", "mail", None, "mail"]):
            model(**batch).loss.backward()
    """
    routing = routing_of(model)
    before = routing.get()
    routing.put(None if methods is None else _routes(routing, methods, lengths))
    return RouteBlock(model, routing, before)


def routing_of(model: nn.Module) -> Routing:
    """The routing of a model whose methods are in it together; ValueError if there is none."""
    return together_of(model).routing


def _routes(routing: Routing, methods, lengths) -> Routes:
    ids = _ids(routing, methods)
    if lengths is None:
        return Routes(ids)
    lengths = torch.as_tensor(lengths)
    if lengths.dtype not in (torch.int64, torch.int32) or lengths.shape != ids.shape:
        raise ValueError(
            f"lengths must hold one whole number for each of the {ids.numel()} methods, got"
            f" {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    if (lengths < 1).any():
        raise ValueError(f"lengths must be 1 or more, got {lengths.tolist()}")
    return Routes(ids, lengths)


def _ids(routing: Routing, methods) -> Tensor:
    if isinstance(methods, str):
        return torch.tensor([_id(routing, methods)])
    if isinstance(methods, Tensor):
        return _checked(routing, methods)
    if not isinstance(methods, Sequence):
        raise TypeError(
            "methods must be a name, a sequence of names or None, or an int64 tensor, got"
            f" {type(methods).__name__}"
        )
    if not methods:
        raise ValueError("methods must name the method of at least one row, got none")
    return torch.tensor([NONE if name is None else _id(routing, name) for name in methods])


def _id(routing: Routing, name) -> int:
    if name not in routing.ids:
        raise ValueError(f"no method is named {name!r}; there are {', '.join(routing.ids)}")
    return routing.ids[name]


def _checked(routing: Routing, ids: Tensor) -> Tensor:
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.numel():
        raise TypeError(
            "methods must be int64 of shape (rows), with at least one row, got"
            f" {ids.dtype} of shape {tuple(ids.shape)}"
        )
    if ids.device.type == "cpu":
        unknown = set(ids.tolist()) - {NONE, *routing.ids.values()}
        if unknown:
            known = ", ".join(f"{i} ({name})" for name, i in routing.ids.items())
            raise ValueError(
                f"methods holds {sorted(unknown)[0]}; there are {NONE} (none), {known}"
            )
    return ids
