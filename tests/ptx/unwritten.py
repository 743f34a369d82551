"""Which memory of torch nobody wrote yet, a flag a byte.

``torch.empty`` and its like give memory without a value. Any other operation of torch that writes
to it counts as writing all of it; what a kernel writes is noted byte by byte.
"""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_EMPTY = {f"aten::{name}" for name in (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}  # fmt: skip
_flags: dict[int, np.ndarray] = {}


def flags(tensor: torch.Tensor) -> np.ndarray | None:
    """The flags of a tensor's storage, which the machine updates; None where all is written."""
    storage = tensor.untyped_storage()
    found = _flags.get(storage.data_ptr())
    return found if found is not None and len(found) == storage.nbytes() else None


def _start(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree) -> list[torch.Tensor]:
    return [t for t in tree_iter(tree) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]


class Unwritten(TorchDispatchMode):
    """Inside, ``flags`` knows what was made without a value."""

    def __enter__(self):
        _flags.clear()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if function._schema.name in _EMPTY:
            for tensor in _tensors(found):
                _flags[_start(tensor)] = np.zeros(tensor.untyped_storage().nbytes(), np.uint8)
        elif _flags:
            given = {_start(tensor) for tensor in _tensors((args, kwargs))}
            made = {_start(tensor) for tensor in _tensors(found)}
            for start in made - given:  # memory that another tensor had, perhaps
                _flags.pop(start, None)
            for tensor in _written(function, args, kwargs):
                _flags.pop(_start(tensor), None)
        return found


def _written(function, args, kwargs) -> list[torch.Tensor]:
    """The arguments that an operation writes to, by its schema."""
    named = list(zip(function._schema.arguments, args))
    by_name = {argument.name: argument for argument in function._schema.arguments}
    named += [(by_name[name], value) for name, value in kwargs.items() if name in by_name]
    return [
        tensor
        for argument, value in named
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value)
    ]
