"""Broken copies of csrc/cuda are caught, by what is meant to catch each.

Every third of them; all with PELT_FAST_MUTANTS=all, as ``make emulate`` runs them.
"""

import os

import pytest

from .cuda_host import MISSING, NVCC, original
from .cuda_mutants import MUTANTS, shown_by

pytestmark = pytest.mark.skipif(NVCC is None, reason=MISSING)
CHOSEN = MUTANTS[:: 1 if os.environ.get("PELT_FAST_MUTANTS") == "all" else 3]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda mutant: mutant.name)
def test_a_broken_copy_is_caught(mutant, tmp_path):
    found = shown_by(mutant.case, mutant.compile(tmp_path))
    assert found.startswith(mutant.by), found or "nothing was found"


@pytest.mark.parametrize("case", dict.fromkeys(mutant.case for mutant in CHOSEN), ids=str)
def test_what_is_not_broken_shows_nothing(case):
    """Or a mutant of the case would be caught by a fault that it does not have."""
    source = next(mutant.source for mutant in MUTANTS if mutant.case == case)
    assert shown_by(case, original(source)) == ""
