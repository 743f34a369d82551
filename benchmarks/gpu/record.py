"""The result file of a part, in ``$OUT`` if that is set, and the minutes that a part may take."""

import os
from pathlib import Path

from benchmarks import record

SECONDS = 450  # of the eight minutes a part may take


class Record(record.Record):
    """``gpu-<part>``."""

    def __init__(self, part: str, folder: Path | None = None, seconds: float = SECONDS):
        out = os.environ.get("OUT")
        super().__init__(f"gpu-{part}", folder or (Path(out) if out else None), seconds)
