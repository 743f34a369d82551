"""docs/robustness.md names tests that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "robustness.md"


def named() -> list[tuple[str, str]]:
    """(file, test or "") of every test the page names; one without a file is in the file before."""
    found, file = [], ""
    for own, test in re.findall(r"`([\w/]+\.py)?(?:::)?(test_\w+)?`", PAGE.read_text()):
        file = own or file
        if own or test:
            found.append((file, test))
    return found


@pytest.mark.parametrize("file, test", named())
def test_the_page_names_tests_that_are_there(file, test):
    places = [ROOT / file, ROOT / "tests" / "models" / file]
    source = next(path for path in places if path.is_file()).read_text()
    assert f"def {test}" in source
