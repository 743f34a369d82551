"""The quick share holds every pair of values, and few rows."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .quick import covering


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(sorted(row.items()), 2)}


@pytest.mark.parametrize(
    "sizes, most", [((3, 7, 3, 2), 25), ((2, 2, 2, 2, 2), 8), ((10, 6, 6), 72)]
)
def test_every_pair_of_values_is_kept(sizes, most):
    rows = [dict(enumerate(row)) for row in itertools.product(*map(range, sizes))]
    kept = [rows[i] for i in covering(rows)]
    assert pairs(kept) == pairs(rows)
    assert len(kept) <= most < len(rows)


def test_of_two_parameters_every_value_is_kept_twice():
    rows = [dict(a=a, b=b) for a in range(24) for b in range(19)]
    kept = [rows[i] for i in covering(rows)]
    assert len(kept) <= 50
    for name, count in (("a", 24), ("b", 19)):
        values = [row[name] for row in kept]
        assert all(values.count(value) >= 2 for value in range(count))


def test_a_pair_that_is_in_no_row_is_not_asked_for():
    rows = [dict(a=a, b=b, c=c) for a, b, c in itertools.product("xy", "xy", "xy") if a != b]
    assert pairs(rows[i] for i in covering(rows)) == pairs(rows)


def test_the_option_leaves_tests_out(passed):
    whole, quick = passed(), passed("--quick")
    assert whole == 27 + 10 + 4 and quick < 12 + 2 + 4


@pytest.fixture
def passed(tmp_path):
    """Runs a file of tests of its own with this suite's options; how many passed."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "three = pytest.mark.parametrize('a', range(3))\n"
        "@pytest.mark.parametrize('c', range(3))\n@pytest.mark.parametrize('b', range(3))\n@three\n"
        "def test_three(a, b, c): pass\n"
        "@pytest.mark.quick(every=5)\n@pytest.mark.parametrize('a', range(10))\n"
        "def test_marked(a): pass\n"
        "@pytest.mark.parametrize('b', range(2))\n@pytest.mark.parametrize('a', range(2))\n"
        "def test_two(a, b): pass\n"
    )

    def run(*options: str) -> int:
        command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider",
                   "--rootdir", str(tmp_path), *options, str(tmp_path)]  # fmt: skip
        ran = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
        return int(re.search(r"(\d+) passed", ran.stdout)[1])

    return run
