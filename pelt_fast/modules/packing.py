"""Frozen weights side by side in one buffer, with room for a trainable block beside them.

Each reader of a buffer, in forward or backward, takes the buffer's lock and first writes the
trainable block of its own call there. It holds the lock until its op has been called. So it never
reads the block of another forward or another thread.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from pelt_fast.ops.common.bundles import FFNMatrices, Packed

ALIGNMENT = 16  # rows or columns of the buffer: a multiple of the tensor core's tile


class Packing:
    """Weights stacked along ``dim`` (0: rows, 1: columns) of one buffer, then a block of ``room``,
    then zeros. Columns are stored as the rows of the transpose, so each weight is contiguous.

    The parameters stay the same objects. The data of each is a view of the buffer with its own
    storage, of exactly the weight's size: code that saves storages (safetensors, torch.save) finds
    none that is shared or too large. A move to another device or dtype gives the weights their own
    memory; if the parameters are still the same objects, they are packed again. Copies and pickles
    hold no buffer.
    """

    def __init__(self, dim: int, room: int):
        self.dim, self.room = dim, room
        self.buffer: Tensor | None = None  # stacked by rows for either dim
        self.own: list[nn.Parameter] = []  # may be moved; never a tensor set for one call

    def holds(self, frozen: Sequence[Tensor]) -> bool:
        """Whether these weights are stored in the buffer."""
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
        """Move the weights into the buffer: an ordinary tensor, even under inference mode."""
        self.own = frozen
        if any(_is_shared(weight) for weight in frozen):
            return  # other processes read this memory
        rows = [self._turned(weight.data) for weight in frozen]
        room = rows[0].new_zeros(self.room + -self.room % ALIGNMENT, rows[0].shape[1])
        self.buffer = torch.cat([*rows, room])
        for weight, region in zip(frozen, self._regions(frozen)):
            weight.data = _with_own_storage(region)

    def pack_again(self, frozen: list[Tensor]) -> None:
        """Pack parameters that were moved since: the parameters themselves, not their replacements
        during one call (``torch.func.functional_call``)."""
        if self.buffer is None and _same(frozen, self.own):
            self.pack(frozen)

    @torch.no_grad()
    def unpack(self, frozen: list[nn.Parameter]) -> None:
        """Move the weights back to their own memory, bit for bit."""
        if self.holds(frozen):
            for weight in frozen:
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self.buffer = None

    def forget(self, frozen: list[nn.Parameter]) -> None:
        """Drop the buffer: other code moved the weights, which are ``frozen`` from now on."""
        self.own, self.buffer = frozen, None

    def adopt(self, frozen: list[nn.Parameter]) -> None:
        """Take over other parameters, if any were registered since: pack these from now on."""
        if not _same(frozen, self.own):
            self.forget(frozen)

    def fill(self, block: Tensor, scale: float = 1) -> None:
        """Write ``scale * block`` below the weights."""
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
        """Convert between the weights' own shape and the buffer's."""
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
        """The stacked weights for one call of the op, which holds the lock. None if the frozen
        weights of this call are not those in the buffer. If ``fills`` equals the number of fills so
        far, this call's forward filled the buffers last, and they hold its block already."""
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
        """Each buffer that exists, with its weights."""
        pairs = ((self.stacked, stacked), (self.out, [out]))
        return [(packing, frozen) for packing, frozen in pairs if packing is not None]

    def hold(self, stacked: list[Tensor], out: Tensor) -> bool:
        """Whether all these weights are stored in the buffers."""
        each = self._each(stacked, out)
        return bool(each) and all(packing.holds(frozen) for packing, frozen in each)

    def pack(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Move the weights into the buffers."""
        self._do(Packing.pack, stacked, out)

    def pack_again(self, stacked: list[Tensor], out: Tensor) -> None:
        """Pack weights that a move, a copy or a merge has unpacked."""
        self._do(Packing.pack_again, stacked, out)

    def unpack(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Move the weights back to their own memory."""
        self._do(Packing.unpack, stacked, out)

    def forget(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Drop the buffers: other code moved the weights."""
        self._do(Packing.forget, stacked, out)

    def adopt(self, stacked: list[nn.Parameter], out: nn.Parameter) -> None:
        """Pack from now on the weights that are registered now."""
        self._do(Packing.adopt, stacked, out)

    def _do(self, what: Callable[[Packing, list], None], stacked: list, out: Tensor) -> None:
        """Apply ``what`` to each buffer and its weights, while nobody reads them."""
        with self.lock:
            self.fills += 1  # a new buffer holds no call's block
            for packing, frozen in self._each(stacked, out):
                what(packing, frozen)

    def _follow(self, device: torch.device) -> None:
        """On a GPU the lock orders launches alone: wait for the work of another thread's stream."""
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
    """Whether a tensor has memory: it is not fake, and no wrapper of a torch.func transform."""
    return type(tensor) in (Tensor, nn.Parameter) and torch._C._has_storage(tensor)


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph captures work on the tensor: each replay must fill the buffers."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_shared(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_shared()


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory, with a storage that begins and ends where ``view`` does."""
    real = _has_memory(view) and view.device.type != "meta"
    return torch.from_dlpack(view) if real else view
