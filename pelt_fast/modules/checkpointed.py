"""What torch's checkpoints run again in backward, after the block of the forward has ended."""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.autograd.graph import Node
from torch.utils import checkpoint

Context = Callable[[], AbstractContextManager]


class RunAgain:
    """A checkpointed function. It runs in contexts of its own, one for each ``key``."""

    def __init__(self, function: Callable):
        self.function, self.contexts = function, {}

    def __call__(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            for context in self.contexts.values():
                stack.enter_context(context())
            return self.function(*args, **kwargs)


def run_again_in(key: object, context: Context) -> None:
    """Make the checkpoint that is running, if any, run its function again in ``context``. The first
    context of a ``key`` holds."""
    found = _running()
    if found is None:
        return
    owner, name = found
    function = getattr(owner, name)
    if not isinstance(function, RunAgain):
        function = RunAgain(function)
        setattr(owner, name, function)
    function.contexts.setdefault(key, context)


def in_checkpoint() -> bool:
    """Whether a checkpoint is running its function for the first time."""
    return _running() is not None


def _running() -> tuple[object, str] | None:
    """The owner and the name of the function that the running checkpoint will run again."""
    return _without_reentry() if torch.is_grad_enabled() else _with_reentry()


def _without_reentry() -> tuple[object, str] | None:
    """A checkpoint without reentry has put a hook on what is saved; the hook knows its frame."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = None if hooks is None else hooks[0]
    if not getattr(pack, "__qualname__", "").startswith("_checkpoint_hook."):
        return None
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or ()))
    return cells["frame"].cell_contents, "recompute_fn"


def _with_reentry() -> tuple[object, str] | None:
    """A checkpoint with reentry is a function of autograd that runs without autograd."""
    node = next(reentrant_nodes(), None)
    return None if node is None else (node, "run_function")


def reentrant_nodes() -> Iterator[Node]:
    """The nodes of the checkpoints with reentry that are running, the inner ones first. Each lives
    as long as the graph in which its function will run again."""
    code = checkpoint.CheckpointFunction.forward.__code__
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            yield frame.f_locals["ctx"]
        frame = frame.f_back
