"""What a part writes as it goes, and the time it has."""

import json
import os
import time
from pathlib import Path

from benchmarks.common import RESULTS, write

SECONDS = 450  # of the eight minutes a part may take


class Record:
    """The result file of one part: rewritten whole after every entry, so that a part cut short
    leaves what it found. ``left`` lists what the time did not allow."""

    def __init__(self, part: str, folder: Path | None = None, seconds: float = SECONDS):
        self.started = time.monotonic()
        self.seconds = seconds
        self.result: dict = {"part": part, "finished": False, "entries": [], "left": []}
        out = os.environ.get("OUT")
        folder = folder or (Path(out) if out else RESULTS)
        self.path = write(f"gpu-{part}", self.result, folder)
        self.machine = json.loads(self.path.read_text())["machine"]

    @property
    def in_time(self) -> bool:
        """Whether there is time for one more entry."""
        return time.monotonic() - self.started < self.seconds

    def add(self, **entry) -> None:
        """Add an entry and rewrite the file."""
        self.result["entries"].append(entry)
        self._write()

    def leave(self, name: str) -> None:
        """Say that ``name`` did not fit."""
        self.result["left"].append(name)
        self._write()

    def finish(self, **totals) -> None:
        """Close the file with what concerns the whole part."""
        self.result.update(totals, finished=True, seconds=round(time.monotonic() - self.started, 1))
        self._write()

    def _write(self) -> None:
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"machine": self.machine, **self.result}, indent=2) + "\n")
        os.replace(part, self.path)
