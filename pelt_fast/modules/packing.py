"""Frozen weights side by side in one buffer, with room for a trainable block beside them."""

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # rows or columns of the buffer: a multiple of the tensor core's tile


class Packing:
    """Weights stacked along ``dim`` (0: rows, 1: columns) of one buffer, then a block of ``room``,
    then zeros.

    The parameters stay themselves and look into the buffer; ``state_dict`` shows what it always
    did. A move to another device or dtype gives them storage of their own: ``filled`` then packs
    again. Copies and pickles hold no buffer.
    """

    def __init__(self, dim: int, room: int):
        self.dim, self.room = dim, room
        self.buffer: Tensor | None = None

    def holds(self, frozen: list[nn.Parameter]) -> bool:
        """Whether the weights live in the buffer."""
        if self.buffer is None:
            return False
        first = 0
        for weight in frozen:
            place = self.buffer.narrow(self.dim, first, weight.shape[self.dim])
            if weight.data_ptr() != place.data_ptr() or weight.stride() != place.stride():
                return False
            first += weight.shape[self.dim]
        return True

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self, frozen: list[nn.Parameter]) -> None:
        """Move the weights into the buffer: an ordinary tensor, whoever calls first."""
        shape = list(frozen[0].shape)
        shape[self.dim] = self.room + -self.room % ALIGNMENT
        parts = [*(weight.data for weight in frozen), frozen[0].new_zeros(shape)]
        self.buffer = torch.cat(parts, self.dim)
        first = 0
        for weight in frozen:
            weight.data = self.buffer.narrow(self.dim, first, weight.shape[self.dim])
            first += weight.shape[self.dim]

    @torch.no_grad()
    def unpack(self, frozen: list[nn.Parameter]) -> None:
        """Give the weights storage of their own again, bit for bit."""
        if self.holds(frozen):
            for weight in frozen:
                weight.data = weight.data.clone(memory_format=torch.contiguous_format)
        self.buffer = None

    def forget(self) -> None:
        """Let the buffer go; the weights are moved by somebody else."""
        self.buffer = None

    @torch.no_grad()
    def filled(
        self, frozen: list[nn.Parameter], block: Tensor, scale: float | Tensor = 1
    ) -> Tensor:
        """The buffer with ``scale * block`` in its room, packed first where it is not."""
        if not self.holds(frozen):
            self.pack(frozen)
        first = sum(weight.shape[self.dim] for weight in frozen)
        # .data: backward reads the block only through the trainable weight's own version check
        place = self.buffer.data.narrow(self.dim, first, self.room)
        if isinstance(scale, Tensor):
            scale = scale.reshape(-1, 1)
        place.copy_(block if isinstance(scale, (int, float)) and scale == 1 else block * scale)
        return self.buffer

    def __getstate__(self):
        return {**self.__dict__, "buffer": None}
