"""Budgets of what the kernels do when they are executed, for sm_90 in bf16."""

import pytest

pytest.importorskip("triton")

from .counted import collect

SECTORS, WAVEFRONTS = 1.05, 1.25  # over the least
# kernels that need more today (sectors, wavefronts), and what makes it
KNOWN = {
    "rank_down_bwd_kernel_da": (1.15, WAVEFRONTS),  # bits of the mask: narrow rows at R = 16
    "rank_up_bwd_kernel": (1.15, WAVEFRONTS),  # narrow rows of h at R = 16
    "routed_down_fwd_kernel": (1.6, 1.6),  # the fp32 parts of a split
    "norm_bwd_kernel_dx": (1.45, 1.4),  # fp32 factors beside 16-bit activations
    "prefix_fwd_kernel": (1.85, WAVEFRONTS),  # an fp32 prefix whose length fills no tile
    "prefix_bwd_kernel": (1.35, WAVEFRONTS),
    "prefix_bwd_kernel_dq": (1.75, WAVEFRONTS),
}


@pytest.fixture(scope="module")
def rows():
    return collect("sm90", "bfloat16")


def test_no_kernel_touches_more_than_its_budget(rows):
    assert len({row.kernel for row in rows}) > 15
    wrong = []
    for row in rows:
        sectors, wavefronts = KNOWN.get(row.kernel, (SECTORS, WAVEFRONTS))
        if row.sectors > sectors * row.least or row.wavefronts > wavefronts * max(row.free, 1):
            wrong.append(f"{row.case}: {row}")
    assert not wrong, "\n".join(wrong)


def test_a_case_moves_no_less_than_its_file_says(rows):
    """What it moves beyond that is read again. Cases whose host copies data have another sum."""
    compared = [row for row in rows if "(with" not in row.case]
    assert len(compared) > 40
    for row in compared:
        assert row.moved >= row.promised, row
