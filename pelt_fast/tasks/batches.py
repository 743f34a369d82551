"""Batches of rows of similar length, drawn again in every epoch."""

from collections.abc import Iterator, Sequence

import torch

POOL = 50  # batches that are sorted by length together: enough to be padded little


class LengthBatches:
    """A batch sampler: rows of similar length are in one batch.

    A batch has ``batch_size`` rows, or as many rows as ``batch_tokens`` tokens allow at the length
    of its longest row. Rows are shuffled, sorted by length in pools of ``POOL`` batches, and cut
    into batches, which are shuffled. Seed and epoch decide the order, so a resumed run sees the
    same batches as an uninterrupted one. The number of batches is rounded down to a multiple of
    ``multiple``, the number of processes.
    """

    def __init__(
        self, lengths: Sequence[int], *, batch_size: int = 0, batch_tokens: int = 0, seed: int = 0,
        multiple: int = 1,
    ):  # fmt: skip
        if (batch_size > 0) == (batch_tokens > 0):
            raise ValueError(f"one of batch_size and batch_tokens must be positive, got"
                             f" {batch_size} and {batch_tokens}")  # fmt: skip
        if batch_tokens and max(lengths) > batch_tokens:
            raise ValueError(
                f"batch_tokens={batch_tokens} holds no row of {max(lengths)} tokens: make it"
                " larger, or max_length smaller"
            )
        self.lengths, self.batch_tokens = list(lengths), batch_tokens
        self.batch_size = batch_size or None  # None tells accelerate that it varies
        self.seed, self.epoch, self.multiple = seed, 0, multiple
        self.drop_last = False
        self._made: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of this epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches())

    def _batches(self) -> list[list[int]]:
        if self._made is None or self._made[0] != self.epoch:
            self._made = self.epoch, self._drawn()
        return self._made[1]

    def _drawn(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        mean = max(1, sum(self.lengths) // len(self.lengths))
        pool = POOL * (self.batch_size or max(1, self.batch_tokens // mean))
        batches = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda row: -self.lengths[row])
            batches += self._cut(rows)
        keep = len(batches) - len(batches) % self.multiple or len(batches)
        mixed = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in mixed[:keep]]

    def _cut(self, rows: list[int]) -> list[list[int]]:
        """Cut rows, the longest first, into batches."""
        batches: list[list[int]] = []
        room = 0  # of the last batch
        for row in rows:
            if room == 0:
                batches.append([])
                room = self.batch_size or self.batch_tokens // max(1, self.lengths[row])
            batches[-1].append(row)
            room -= 1
        return batches
