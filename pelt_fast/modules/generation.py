"""What a generate keeps from one step to the next, in its own thread.

Nothing of a model changes while it generates. The first step checks what a site rests on
(:mod:`.decision`). A site may then keep the call that later steps run: in a decoder's step of one
token, the checks in front of an op take longer than its products. All is dropped at the end.
"""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from pelt_fast.ops.common.backends import active
from pelt_fast.ops.common.library import OF_THE_DEVICE, is_plain


class _Generation(threading.local):
    """``kept``: by what keeps it; one dict for each generate, None outside."""

    kept: dict[Hashable, object] | None = None


generation = _Generation()


@contextlib.contextmanager
def one_generate() -> Iterator[None]:
    """Context: this thread's forwards in it are the steps of one generate."""
    before, generation.kept = generation.kept, {}
    try:
        yield
    finally:
        generation.kept = before


def is_first(checker: Hashable) -> bool:
    """Whether ``checker`` asks for the first time in this generate."""
    if checker in generation.kept:
        return False
    generation.kept[checker] = None
    return True


def next_step(site: Hashable, x: Tensor) -> Callable | None:
    """The call that ``site`` keeps for inputs like x in this generate; None if it has to decide."""
    shape, strides, call = generation.kept.get(site, (None, None, None))
    alike = shape == x.shape and strides == x.stride()
    return call if alike and not torch.is_grad_enabled() else None


def keep_step(site: Hashable, x: Tensor, make: Callable[..., Callable | None], *args) -> None:
    """Keep ``make(x, *args)`` in this generate for the next inputs like x, unless it is None, or
    other code has to see each op."""
    if torch.is_grad_enabled() or active.name not in OF_THE_DEVICE:
        return
    call = make(x, *args) if is_plain((x,)) else None
    if call is not None:
        generation.kept[site] = (x.shape, x.stride(), call)
