"""A pytest plugin for the numerics suite on a GPU: one line of JSON for each test, so that a
process that ends early keeps what it found. A process whose GPU context is lost ends, because every
later test in it would fail."""

import json
import os

import torch

VARIABLE = "PELT_FAST_REPORT"  # the file the lines go to
LOST = 70  # the exit status of such a process


def pytest_runtest_logreport(report) -> None:
    """Write a test's outcome: that of its call, or of a set-up that did not pass."""
    if report.when == "teardown" or (report.when == "setup" and report.passed):
        return
    line = dict(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2))
    if report.failed:
        line["message"] = report.longreprtext[-3000:]
    if report.skipped:
        line["message"] = str(report.longrepr[2])
    with open(os.environ[VARIABLE], "a") as file:
        file.write(json.dumps(line) + "\n")
    if report.failed and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(LOST)
