"""Every kernel, every row of its table, compiled for GPUs that are not here.

All launches for Hopper. Of each launcher every fourth for the other targets, because compiling all takes 13
minutes of a core; ``make codegen`` compiles all of them, and fails where one of them misses a limit.
``pytest --quick`` compiles one of 48, if docs/codegen.md was made from these very sources.
"""

import pytest

from . import report
from .digest import page_is_of
from .limits import problems

triton = pytest.importorskip("triton")

EVERY = {"sm90": 1}


@pytest.mark.parametrize("target", report.TARGETS)
def test_every_kernel_compiles_within_the_limits(target, tmp_path, request):
    every = EVERY.get(target, 4)
    if request.config.getoption("--quick") and page_is_of(report.DOCS.read_text()):
        every = 48
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
