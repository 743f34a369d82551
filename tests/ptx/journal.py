"""Accesses that are not yet in the watch's tables, because mostly nobody looks."""

from dataclasses import dataclass

import numpy as np

from .flags import READ, WRITES, WROTE

_LONGEST = 256  # notes: what is older goes into the tables


@dataclass(eq=False)
class Note:
    """Agents (n,) accessed the bytes ``at * size`` and on. ``clocks`` is what each warp's clock was;
    of asynchronous writes it is the number of each one's work."""

    kind: int
    at: np.ndarray
    size: int
    agents: np.ndarray
    clocks: np.ndarray
    number: int
    known: bool = True  # to all warps of the block, after its next barrier


def rows_of(watch, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The writers of bytes and their clocks, ``size`` bytes a row."""
    whole = watch.size // size * size
    return watch.writer[:whole].reshape(-1, size), watch.write_clock[:whole].reshape(-1, size)


class Journal:
    """Notes of ordinary accesses, and the asynchronous writes that somebody may not know."""

    def __init__(self, watch):
        self.watch = watch
        self.notes: list[Note] = []
        self.count = 0
        self.last = np.zeros(watch.blocks, np.int64)  # the notes before each block's last barrier
        self.pending: list[tuple] = []

    def add(self, kind: int, at: np.ndarray, size: int, warps: np.ndarray) -> None:
        """An access, which was found to be in order."""
        watch = self.watch
        self._note(kind, at, size, warps, watch.clocks[:, : watch.warps].diagonal().copy())

    def _note(self, *fields) -> Note:
        self.count += 1
        note = Note(*fields, self.count)
        self.notes.append(note)
        if len(self.notes) >= _LONGEST:
            self.settle()
        return note

    def settle(self, reads: bool = True) -> None:
        """All notes into the tables, or only those of writes."""
        if self.notes:
            notes, self.notes = self.notes, []
            for note in notes:
                if reads or note.kind != READ:
                    self._settle(note)
                else:
                    self.notes.append(note)

    def _settle(self, note: Note) -> None:
        if note.kind != READ:
            clocks = note.clocks[note.agents] if note.kind == WROTE else note.clocks
            for array, value in zip(rows_of(self.watch, note.size), (note.agents, clocks)):
                array[note.at] = value[:, None]
            return
        first, last = int(note.agents[0]), int(note.agents[-1])
        for warp in [first] if first == last else np.unique(note.agents).tolist():
            rows = self.watch.reads_of(warp).reshape(-1, note.size)
            here = note.at if first == last else note.at[note.agents == warp]
            rows[here] = note.clocks[warp]

    def passed(self, blocks: np.ndarray) -> None:
        """All warps of blocks met: what was before is known to all of them."""
        self.last[blocks] = self.count
        if self.pending:
            self._forget(blocks)
        known = int(self.last.min())
        if self.notes and self.notes[0].number <= known:
            notes, self.notes = self.notes, []
            for note in notes:
                if note.number > known or not note.known:
                    self.notes.append(note)
                elif note.kind != READ and self.watch.proxies:
                    self._settle(note)

    def late(self, at: np.ndarray, size: int, agents: np.ndarray, numbers: np.ndarray) -> None:
        """Work ``numbers`` of agents will write the bytes ``at * size`` and on."""
        note = self._note(WRITES, at, size, agents, numbers)
        note.known = False
        self.pending.append((note, at, agents, numbers))
        if len(self.pending) > _LONGEST:  # the flags of the oldest stay: the tables are looked at
            self.settle(reads=False)
            self.pending.pop(0)

    def _forget(self, blocks: np.ndarray) -> None:
        """Asynchronous writes that all warps of their blocks know are ordinary ones."""
        watch, pending, self.pending = self.watch, self.pending, []
        meeting = np.zeros(watch.blocks, bool)
        meeting[blocks] = True
        for note, at, agents, numbers in pending:
            block = at * note.size // watch.stride
            known = watch.clocks[block * watch.each, agents] >= numbers
            known &= meeting[block]
            count = np.count_nonzero(known)
            note.known = count == len(at)
            if not note.known:
                stay = slice(None) if count == 0 else ~known
                self.pending.append((note, at[stay], agents[stay], numbers[stay]))
            if count:
                done = at if note.known else at[known]
                watch.flags.reshape(-1, note.size)[done] &= 255 - WRITES
        for note, at, _, _ in self.pending:  # where two wrote the same bytes
            watch.flags.reshape(-1, note.size)[at] |= WRITES
