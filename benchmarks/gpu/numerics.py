"""The numerics suite and ``pelt-fast check``, compiled on the GPU: every miss is written down."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import REPOSITORY, load, paths_of

from .record import Record
from .reporter import LOST, VARIABLE

WORKERS = 14  # processes: compiling takes most of the time
SLOW = "test_op_compiles_without_a_graph_break"  # torch.compile: last, it may not fit


def environment() -> dict[str, str]:
    """This process's, with the package on the path and the kernels compiled."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def collect(folder: str = "tests/numerics") -> list[str]:
    """The names of the tests: first those that the committed runs left out most often, the slow
    ones after others that wait as long."""
    command = [sys.executable, "-m", "pytest", folder, "--collect-only", "-q", "-o", "addopts="]
    ran = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True
    )  # fmt: skip
    names = [line for line in ran.stdout.splitlines() if "::" in line]
    if ran.returncode or not names:
        raise RuntimeError(f"pytest found no tests:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    waiting = _waiting()
    return sorted(names, key=lambda name: (-waiting[name], SLOW in name))


def _waiting() -> Counter:
    """Test -> how many of the newest committed runs, without a gap, had no time for it; more than
    all runs for a test that the newest one missed. So every test is run again in its turn."""
    try:
        runs = [load(path) for path in paths_of("gpu-numerics")]
    except FileNotFoundError:
        return Counter()
    waiting = Counter(dict.fromkeys(_missed(runs[0]), len(runs) + 1))
    still = set(runs[0]["left"])
    for run in runs:
        still &= set(run["left"])
        waiting.update(still)
    return waiting


def _missed(run: dict) -> set[str]:
    return {e["test"] for e in run["entries"] if e.get("outcome") == "failed"}


@dataclass
class Worker:
    """A process of pytest over ``names``, and the lines that its reporter has written."""

    names: list[str]
    lines: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start on the tests that have no line yet."""
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-o", "addopts=",
                   "-p", "benchmarks.gpu.reporter", *self.waiting()]  # fmt: skip
        with self.lines.with_suffix(".log").open("w") as out:
            self.process = subprocess.Popen(
                command, cwd=REPOSITORY, env={**environment(), VARIABLE: str(self.lines)},
                stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def reports(self) -> list[dict]:
        """The reports so far."""
        if not self.lines.exists():
            return []
        whole, _, _ = self.lines.read_text().rpartition("\n")  # a line may be incomplete
        return [json.loads(line) for line in whole.splitlines()]

    def waiting(self) -> list[str]:
        """The tests without a line."""
        known = {report["test"] for report in self.reports()}
        return [name for name in self.names if name not in known]

    def goes_on(self) -> bool:
        """Whether the process runs. One that ended with tests left is started again after the test
        that ended it, which counts as failed."""
        if self.process.poll() is None:
            return True
        left = self.waiting()
        if not left or self.process.returncode in (0, 1):
            return False
        if self.process.returncode != LOST:
            said = self.lines.with_suffix(".log").read_text()[-3000:]
            line = dict(test=left[0], outcome="failed", seconds=0, message=said)
            with self.lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.start()
        return True


def run(record: Record, device: torch.device, folder: str = "tests/numerics") -> int:
    """Run everything in several processes; 1 when one comparison misses."""
    names = collect(folder)
    count = min(WORKERS, os.cpu_count() or 1, len(names))
    with tempfile.TemporaryDirectory() as scratch:
        workers = [Worker(names[i::count], Path(scratch) / f"{i}.jsonl") for i in range(count)]
        reports = _watch(record, workers)
    outcomes = Counter(report["outcome"] for report in reports)
    slowest = sorted(reports, key=lambda report: -report["seconds"])[:10]
    misses = _check(record, device) if record.in_time else None
    skips = Counter(report["message"] for report in reports if report["outcome"] == "skipped")
    record.finish(tests=len(names), **outcomes, skips=skips,
                  slowest=[(r["test"], r["seconds"]) for r in slowest])  # fmt: skip
    _print(reports, outcomes, misses)
    return int(bool(outcomes["failed"] or misses))


def _watch(record: Record, workers: list[Worker]) -> list[dict]:
    """Wait for all processes; end them when the time is over."""
    for worker in workers:
        worker.start()
    while [worker for worker in workers if worker.goes_on()]:
        _keep(record, workers)
        if not record.in_time:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
            break
        time.sleep(0.5)
    _keep(record, workers)
    for name in (name for worker in workers for name in worker.waiting()):
        record.leave(name)
    return [report for worker in workers for report in worker.reports()]


def _keep(record: Record, workers: list[Worker]) -> None:
    """Write new misses to the result file: an ended run leaves only this file."""
    known = {entry["test"] for entry in record.entries}
    for report in (report for worker in workers for report in worker.reports()):
        if report["outcome"] == "failed" and report["test"] not in known:
            record.add(**report)


def _check(record: Record, device: torch.device) -> str | None:
    """The errors that ``pelt-fast check`` reports, or None."""
    command = [sys.executable, "-m", "pelt_fast", "check", "--device", device.type]
    ran = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    misses = [line for line in ran.stdout.splitlines() if line.startswith("MISS")]
    record.add(command="pelt-fast check", exit=ran.returncode, misses=misses,
               last=ran.stdout.splitlines()[-1:])  # fmt: skip
    return "\n".join(misses) or (ran.stderr[-2000:] if ran.returncode else None)


def _print(reports: list[dict], outcomes: Counter, misses: str | None) -> None:
    for report in reports:
        if report["outcome"] == "failed":
            lines = [line for line in report["message"].splitlines() if line.startswith("E ")]
            print(f"MISS {report['test']}\n     {(lines or ['?'])[0][:200]}")
    print(", ".join(f"{count} {name}" for name, count in outcomes.items()))
    if misses:
        print(f"pelt-fast check:\n{misses}")
