"""The results of a study: a file with one JSON row for each run."""

import json
from pathlib import Path

from pelt_fast.config import PeltConfig

from .identity import digest
from .meter import append_line

RESULTS = "results.jsonl"


class Results:
    """The rows of a study's file, by key. ``folder`` holds the file and the runs' output."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / RESULTS
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.rows = {row["key"]: row for row in map(json.loads, filter(None, lines))}

    def add(self, row: dict) -> dict:
        """Append a row to the file."""
        append_line(self.path, row)
        self.rows[row["key"]] = row
        return row


def runs(results: Results, task: str, config: PeltConfig, phase: str) -> list[dict]:
    """The runs of a method, one for each seed and rate, under the task's newest setting."""
    told = task, phase
    found = [row for row in results.rows.values() if (row["task"], row["phase"]) == told]
    method = digest(config.as_dict())
    return [
        row for row in found
        if row["setting"] == found[-1]["setting"] and row["config_key"] == method
    ]  # fmt: skip
