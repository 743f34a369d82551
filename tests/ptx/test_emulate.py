"""The table of ``make emulate``: what the tests of a kernel come to, in a line."""

import re
import subprocess
import sys

from .emulate import HEAD, TESTS, ratio, rows, table
from .plugin import Record

LAUNCH = dict(instructions=1500, sectors=40, least=32, wavefronts=0, free=0, seconds=0.25)


def record(worst: float | None, *kernels: str) -> dict:
    """What a test leaves that launched kernels."""
    launches = [dict(kernel=name, dtype="bf16", **LAUNCH) for name in kernels]
    return dict(target="sm90", worst=worst, launches=launches)


def test_the_error_is_the_worst_of_the_tests_that_have_a_budget():
    found = rows([record(0.5, "a", "b"), record(None, "a"), record(0.0, "c"), record(0.25, "b")])
    assert [(line[0], line[3], line[4]) for line in found] == [
        ("a", 2, "0.50"), ("b", 2, "0.50"), ("c", 1, "0.00"),
    ]  # fmt: skip


def test_a_kernel_that_no_test_compares_by_a_budget_has_a_dash():
    (line,) = rows([record(None, "a"), record(None, "a")])
    assert line == ("a", "sm90", "bf16", 2, "-", "3,000", "1.25", "-", "0.5")
    assert table(HEAD, [line]).splitlines()[2].split("|")[5].strip() == "-"


def test_a_test_without_a_budget_has_no_error():
    new = Record()
    assert new.worst is None
    for found in (0.0, 0.75, 0.5):
        new.checked(found)
    assert new.worst == 0.75 and ratio(3, 0) == "-"


def test_the_workers_of_a_run_collect_the_same_tests():
    """xdist refuses what differs from process to process, as an address in a test's name does."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        *TESTS[1:],
    ]  # the others are of every run
    collected = subprocess.run(command, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stdout[-2000:]
    assert "::test_the_loss_and_the_gradients_are_within_the_budget[" in collected.stdout
    assert not re.findall(r".* at 0x[0-9a-f]+.*", collected.stdout)
