"""The result file of a run, and the time that the run has."""

import time
from pathlib import Path

from benchmarks import doubts
from benchmarks.common import dump, machine, result_path


class Record:
    """The result file of one run, written again after every entry, so that an interrupted run
    keeps its entries. ``left`` lists what was left out for lack of time.

    ``path`` is the user's own choice, a file that does not exist yet; without it a name is made.
    Without both it goes to ``benchmarks/results``; ValueError if ``doubts`` has one then.
    ``timed``: whether the entries are times, for which the machine must be quiet.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None = None,
        seconds: float | None = None,
        path: Path | None = None,
        timed: bool = True,
    ):
        if path is not None and path.exists():
            raise ValueError(f"{path} exists, and results are never written over: choose another")
        if path is None and folder is None:
            doubts.check(timed)
        self.started = time.monotonic()
        self.seconds = seconds
        self.result: dict = {"part": name, "finished": False, "entries": [], "left": []}
        self.machine = machine()
        self.path = path or result_path(name, self.machine, folder)
        self._write()

    @property
    def entries(self) -> list[dict]:
        """The entries so far."""
        return self.result["entries"]

    @property
    def in_time(self) -> bool:
        """Whether there is time for one more entry."""
        return self.seconds_left > 0

    @property
    def seconds_left(self) -> float:
        """The seconds that are left; infinity without a limit."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - (time.monotonic() - self.started)

    def add(self, **entry) -> None:
        """Add an entry."""
        self.result["entries"].append(entry)
        self.result["finished"] = False
        self._write()

    def leave(self, name: str) -> None:
        """Note that there was no time for ``name``."""
        self.result["left"].append(name)
        self._write()

    def finish(self, **totals) -> None:
        """Close the file with the facts about the whole run."""
        self.result.update(totals, finished=True, seconds=round(time.monotonic() - self.started, 1))
        self._write()

    def _write(self) -> None:
        dump(self.path, {"machine": self.machine, **self.result})
