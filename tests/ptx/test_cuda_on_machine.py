"""csrc/cuda executed: nvcc's PTX, launched by the code's own host functions, against fp64."""

import pytest
import torch

from . import cuda_launch
from .cuda_cases import SHUFFLED, Backward, Tail, differs
from .cuda_host import MISSING, NVCC
from .machine import EARLY, LATE

pytestmark = pytest.mark.skipif(NVCC is None, reason=MISSING)
BF16, F16 = torch.bfloat16, torch.float16

BACKWARD = [  # one row; edges of both tiles; more steps than stages; each block of the rank; parts
    Backward(1, 8, 8),
    Backward(37, 520, 8, F16, "sm_90a"),
    Backward(200, 536, 16),
    Backward(150, 264, 24, target="sm_90a", need_bias=False),
    Backward(150, 264, 32, F16),
    Backward(90, 264, 40, target="sm_90a", processors=3),
    Backward(90, 264, 64, F16, processors=3),
]
TAIL = [  # one tile; less than one; edges of tiles and several tiles a block; tails of several steps
    Tail(128, 64, 256, 16, cluster=1),
    Tail(1, 8, 8, 8, F16),
    Tail(1, 8, 8, 8, transposed=True, cluster=1, need_bias=False),
    Tail(300, 200, 520, 40),
    Tail(300, 200, 520, 40, F16, transposed=True, masked=False),
    Tail(300, 72, 264, 24, cluster=1, transposed=True),
    Tail(300, 72, 264, 24, F16, cluster=1, masked=False, need_bias=False),
    Tail(130, 1000, 264, 136, F16),
    Tail(130, 1000, 264, 136, transposed=True),
    Tail(130, 72, 320, 24),  # the mask eight bytes at once: a whole tile of columns, a part of one
    Tail(130, 72, 320, 24, F16, cluster=1, skew=3),
]


@pytest.mark.quick(every=3)
@pytest.mark.parametrize("case", BACKWARD + TAIL, ids=str)
def test_the_kernel_matches_fp64_and_does_not_depend_on_the_order(case):
    early = case.run(EARLY)
    case.check(early)
    assert not differs(early, case.run(LATE)), "asynchronous work that was not waited for"
    assert not differs(early, case.run(SHUFFLED)), "the order of warps"


@pytest.mark.parametrize("case", TAIL, ids=str)
def test_a_tail_that_is_left_out_would_be_seen(case):
    with pytest.raises(AssertionError, match="torch"):
        case.check(case.without_tail())


@pytest.mark.parametrize("R", [16, 32, 64])
def test_rank_backward_has_no_conflicts_of_banks(R, monkeypatch):
    found = []
    monkeypatch.setattr(cuda_launch, "watched", lambda _, counts: found.append(counts))
    Backward(64, 512, R).run(EARLY)
    assert found[0].wavefronts <= 1.1 * found[0].free, (found[0].wavefronts, found[0].free)


def test_a_mask_of_whole_words_is_read_once(monkeypatch):
    found = []
    monkeypatch.setattr(cuda_launch, "watched", lambda _, counts: found.append(counts))
    for masked in (True, False):
        Tail(256, 64, 512, 16, masked=masked).run(EARLY)
    with_mask, without = (counts.sectors for counts in found)
    assert with_mask - without == 256 * 512 // 8 // 32


def test_results_do_not_depend_on_the_processors():
    few, many = (Tail(300, 72, 520, 16, processors=n).run(LATE) for n in (2, 8))
    assert not differs(few, many)
