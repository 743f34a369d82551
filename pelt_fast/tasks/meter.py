"""Time and memory of a run, measured while it trains, and the lines of its log."""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

LOG = "log.jsonl"
CLEAR = Path("/proc/self/clear_refs")


class Meter:
    """Seconds of every optimizer step, and the peak of memory."""

    def __init__(self):
        self.steps: list[float] = []
        self._since = 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():  # Linux: let the peak of the resident set begin again
            CLEAR.write_text("5")

    def callback(self, folder: Path | None):
        """A callback for the Trainer. It writes the log to ``folder`` during the run."""
        from transformers import TrainerCallback

        meter = self

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                meter._since = time.perf_counter()

            def on_step_end(self, *args, **kwargs):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                meter.steps.append(time.perf_counter() - meter._since)

            def on_log(self, args, state, control, logs=None, **kwargs):
                if folder is not None and state.is_world_process_zero:
                    append_line(folder / LOG, {"step": state.global_step, **(logs or {})})

        return Clock()

    @property
    def median(self) -> float:
        """Median seconds of a step, without the first if there are others."""
        return statistics.median(self.steps[1:] or self.steps or [0.0])

    @staticmethod
    def peak() -> int:
        """Bytes of memory at the peak."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if CLEAR.exists():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def append_line(path: Path, row: dict) -> None:
    """Append a row as a line of JSON, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def losses(log: list[dict]) -> list[float]:
    """The training losses of a log, to four decimals."""
    return [round(entry["loss"], 4) for entry in log if "loss" in entry]
