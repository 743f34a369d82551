"""Every kernel, every row of its table, compiled for GPUs that are not here.

All launches for Hopper. Of each launcher every fourth for the other targets, because compiling all takes 13
minutes of a core; ``make codegen`` compiles all of them, and fails where one of them misses a limit.
"""

import pytest

from . import report
from .limits import problems

triton = pytest.importorskip("triton")

EVERY = {"sm90": 1}


@pytest.mark.parametrize("target", report.TARGETS)
def test_every_kernel_compiles_within_the_limits(target, tmp_path):
    every = EVERY.get(target, 4)
    rows = report.collect(target, tmp_path, every)
    for row in rows:
        print(report.line(row))
    wrong = [
        f"{row['kernel']} of {row['launch']}: {'; '.join(found)}"
        for row in rows
        if (found := problems(target, row))
    ]
    assert len(rows) > 100 // every
    assert not wrong, "\n".join(wrong)
