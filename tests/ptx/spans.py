"""``Watch.write_later`` for bytes in a row, which bulk loads write: views instead of gathers."""

import numpy as np

from .watch import READ, READS, WRITES, Knowledge, Watch

UNIT = 16


def write_span_later(watch: Watch, span: slice, agent: int, number: int, known: Knowledge) -> None:
    """Work ``number`` of an agent will write whole units of 16 bytes in a row."""
    watch.journal.settle(reads=False)
    writer, clock = watch.writer[span], watch.write_clock[span]
    wrong = (writer >= 0) & (writer != agent) & (known.clocks[writer] < clock)
    clocks = []
    if (watch.flags[span] & (READ | READS)).any():
        watch.journal.settle()
        clocks = [(reader, each[span]) for reader, each in watch.read_clock.items()]
    if wrong.any() or any(
        reader != agent and (each > known.clocks[reader]).any() for reader, each in clocks
    ):
        watch.write_later(np.arange(span.start, span.stop), agent, number, known)  # says what
    for _, each in clocks:
        each.fill(0)
    watch.flags[span] = WRITES
    units = np.arange(span.start // UNIT, span.stop // UNIT)
    agents, numbers = np.full((2, len(units)), [[agent], [number]])
    watch.journal.late(units, UNIT, agents, numbers)
