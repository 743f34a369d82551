"""A step of MAM stays in few files; what is counted is what the docstring says."""

import sys

import pytest
import torch

from benchmarks.changes_of_file import PARTS, Part, Walk, measure, report, trace, walk
from pelt_fast import env, presets


@pytest.fixture(scope="module")
def walks():
    return measure()


@pytest.mark.parametrize("name", PARTS)
def test_a_step_changes_file_seldom(walks, name):
    assert walks[name].within(PARTS[name]), trace(walks[name])


def test_a_change_is_a_call_in_another_file_of_ours():
    def work():
        presets.method("lora")  # two calls and more of one file
        torch.zeros(3).tolist()  # not ours
        presets.method("lora")
        env.interpret()

    files = [name for name in walk(work).visits if not name.endswith("config.py")]
    assert files[0] == "pelt_fast/presets.py" and files[-1] == "pelt_fast/env.py"
    assert files.count("pelt_fast/presets.py") == len(files) - 1
    with pytest.raises(ValueError, match="unknown method"):
        walk(lambda: presets.method("nope"))
    assert sys.getprofile() is None


def test_the_table_shows_the_limits():
    found = Walk(("pelt_fast/a.py", "pelt_fast/b.py", "pelt_fast/a.py"))
    assert (found.changes, found.files) == (3, 2)
    assert found.within(Part("", 3, 2)) and found.within(Part("", 3))
    assert not found.within(Part("", 2, 2)) and not found.within(Part("", 3, 1))
    (row,) = report({"ffn": found}).splitlines()[2:]
    assert row.split("|")[3:7] == [" 3               ", " 2     ", " 14 / 8  ", " met "]
    assert trace(found).splitlines()[-2:] == ["   2 x pelt_fast/a.py", "   1 x pelt_fast/b.py"]
