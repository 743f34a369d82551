"""Frozen weights side by side in one buffer, with room for a trainable block beside them.

Whoever reads a buffer fills it first with the block of its own call, forward and backward alike,
and keeps the others out until its op has been called: what another forward, or another thread, left
there is never read.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pelt_fast.ops.common.bundles import FFNMatrices, Packed

ALIGNMENT = 16  # rows or columns of the buffer: a multiple of the tensor core's tile


class Packing:
    """Weights stacked along ``dim`` (0: rows, 1: columns) of one buffer, then a block of ``room``,
    then zeros. Columns are kept as the rows of the transpose: each weight is one run of memory.

    The parameters stay themselves and look into the buffer, each through a storage of its own over
    its run: what saves by storage (safetensors, torch.save) finds none that is shared, none that
    holds more. A move to another device or dtype gives them memory of their own; they are packed
    again where they are still the parameters that were packed. Copies and pickles hold no buffer.
    """

    def __init__(self, dim: int, room: int):
        self.dim, self.room = dim, room
        self.buffer: Tensor | None = None  # rows, whatever the dim
        self.own: list[nn.Parameter] = []  # what may be moved: never a tensor put there for a call

    def holds(self, frozen: Sequence[Tensor]) -> bool:
        """Whether these weights live in the buffer."""
        if self.buffer is None or self.buffer.dtype != frozen[0].dtype:
            return False
        return all(
            _has_memory(weight)
            and weight.data_ptr() == region.data_ptr()
            and weight.stride() == region.stride()
            for weight, region in zip(frozen, self._regions(frozen))
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self, frozen: list[nn.Parameter]) -> None:
        """Move the weights into the buffer: an ordinary tensor, whoever calls first."""
        self.own = frozen
        if any(_is_shared(weight) for weight in frozen):
            return  # other processes look at this memory
        rows = [self._turned(weight.data) for weight in frozen]
        room = rows[0].new_zeros(self.room + -self.room % ALIGNMENT, rows[0].shape[1])
        self.buffer = torch.cat([*rows, room])
        for weight, region in zip(frozen, self._regions(frozen)):
            weight.data = _with_own_storage(region)

    def pack_again(self, frozen: list[Tensor]) -> None:
        """Pack parameters that were moved since: they themselves, not what stands in for them
        during one call (``torch.func.functional_call``)."""
        if self.buffer is None and _same(frozen, self.own):
            self.pack(frozen)

    @torch.no_grad()
    def unpack(self, frozen: list[nn.Parameter]) -> None:
        """Give the weights memory of their own again, bit for bit."""
        if self.holds(frozen):
            for weight in frozen:
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self.buffer = None

    def forget(self, frozen: list[nn.Parameter]) -> None:
        """Let the buffer go; the weights, ``frozen`` from now on, were moved by somebody else."""
        self.own, self.buffer = frozen, None

    def adopt(self, frozen: list[nn.Parameter]) -> None:
        """Where other parameters were registered since: these are to be packed from now on."""
        if not _same(frozen, self.own):
            self.forget(frozen)

    def fill(self, block: Tensor, scale: float = 1) -> None:
        """Put ``scale * block`` among the weights."""
        first = self.buffer.shape[0] - self.room - -self.room % ALIGNMENT
        region = self._turned(self.buffer.narrow(0, first, self.room))
        if scale == 1:
            region.copy_(block.detach())
        else:
            torch.mul(block.detach(), scale, out=region)

    @property
    def whole(self) -> Tensor:
        """The stacked weights."""
        return self._turned(self.buffer)

    def _turned(self, matrix: Tensor) -> Tensor:
        """From the weights' own shape to the buffer's, and back."""
        return matrix if self.dim == 0 else matrix.t()

    def _regions(self, frozen: Sequence[Tensor]) -> Iterator[Tensor]:
        """Where in the buffer each weight belongs."""
        first = 0
        for weight in frozen:
            yield self._turned(self.buffer.narrow(0, first, weight.shape[self.dim]))
            first += weight.shape[self.dim]

    def __getstate__(self):
        return {**self.__dict__, "buffer": None}


class Packings:
    """The buffers of one widened FFN: [gate; in; D] and [out | s U], either or none."""

    def __init__(self, stacked: Packing | None, out: Packing | None):
        self.stacked, self.out = stacked, out
        self._begin()

    def _begin(self) -> None:
        self.lock = threading.Lock()
        self.fills = 0  # how often the buffers were filled
        self._stream: torch.cuda.Stream | None = None

    def filled(self, weights: FFNMatrices, scale: float, fills: int = -1) -> Packed:
        """The stacked weights of one call of the op, which holds the lock; None where the frozen
        weights of this call are not those that live in the buffer. Where ``fills`` is the number of
        fills so far, the buffers hold this call's block already: its forward was the last to fill
        them."""
        stack = [weights.in_weight]
        if weights.gate_weight is not None:
            stack.insert(0, weights.gate_weight)
        in_place = fills == self.fills and not _is_captured(weights.in_weight)
        self.fills += not in_place
        packed = packed_out = None
        if self.stacked is not None and self.stacked.holds(stack):
            self._follow(self.stacked.buffer.device)
            if not in_place:
                self.stacked.fill(weights.down_weight)
            packed = self.stacked.whole
        if self.out is not None and self.out.holds([weights.out_weight]):
            self._follow(self.out.buffer.device)
            if not in_place:
                self.out.fill(weights.up_weight, scale)
            packed_out = self.out.whole
        return Packed(packed, packed_out)

    def _each(self, stacked: list[Tensor], out: Tensor) -> list[tuple[Packing, list[Tensor]]]:
        """Each buffer that is there, with the weights it is for."""
        pairs = ((self.stacked, stacked), (self.out, [out]))
        return [(packing, frozen) for packing, frozen in pairs if packing is not None]

    def hold(self, stacked: list[Tensor], out: Tensor) -> bool:
        """Whether all these weights live in the buffers."""
        each = self._each(stacked, out)
        return bool(each) and all(packing.holds(frozen) for packing, frozen in each)

    def pack(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Move the weights into the buffers."""
        self._do(Packing.pack, stacked, out)

    def pack_again(self, stacked: list[Tensor], out: Tensor) -> None:
        """Pack what a move, a copy or a merge has unpacked."""
        self._do(Packing.pack_again, stacked, out)

    def unpack(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Give the weights memory of their own again."""
        self._do(Packing.unpack, stacked, out)

    def forget(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Let the buffers go; the weights were moved by somebody else."""
        self._do(Packing.forget, stacked, out)

    def adopt(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Take the weights as they are registered now for those to pack."""
        self._do(Packing.adopt, stacked, out)

    def _do(self, what: Callable[[Packing, list], None], stacked: list, out: Tensor) -> None:
        """``what`` to each buffer with the weights it is for, while nobody reads them."""
        with self.lock:
            for packing, frozen in self._each(stacked, out):
                what(packing, frozen)

    def _follow(self, device: torch.device) -> None:
        """On a GPU the lock orders launches: the work of another thread's stream comes first."""
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def __getstate__(self):
        return {"stacked": self.stacked, "out": self.out}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()


def _same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second))


def _has_memory(tensor: Tensor) -> bool:
    """Whether a tensor lies somewhere: not a fake one, not what a torch.func transform wraps."""
    return type(tensor) in (Tensor, nn.Parameter) and torch._C._has_storage(tensor)


def _is_captured(tensor: Tensor) -> bool:
    """Whether work on the tensor becomes part of a CUDA graph: a replay must fill for itself."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_shared(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_shared()


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory through a storage that begins and ends where ``view`` does."""
    real = _has_memory(view) and view.device.type != "meta"
    return torch.from_dlpack(view) if real else view
