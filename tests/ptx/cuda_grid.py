"""Every combination of what the kernels of csrc/cuda take, executed: ``make emulate`` names this
file; the tests have a selection of it (``test_cuda_on_machine.py``)."""

import itertools

import pytest
import torch

from .cuda_cases import Backward, Tail
from .cuda_host import MISSING, NVCC
from .machine import Mode
from .plugin import ORDERS

pytestmark = pytest.mark.skipif(NVCC is None, reason=MISSING)
DTYPES = (torch.bfloat16, torch.float16)
TARGETS = {"sm_80": "sm80", "sm_90a": "sm90"}  # of PTX, and how the machine's plugin calls it
BACKWARD = [
    Backward(*shape, dtype, target, processors=4, need_bias=need_bias)
    for shape in [(1, 8, 8), (31, 256, 16), (33, 512, 24), (65, 520, 32), (97, 1032, 48),
                  (130, 264, 64), (1000, 1000, 40)]
    for dtype, target, need_bias in itertools.product(DTYPES, TARGETS, (True, False))
]  # fmt: skip
TAIL = [
    Tail(*shape, *rest, processors=3)
    for shape in [(8, 64, 8, 8), (129, 72, 264, 72), (257, 136, 24, 136), (70, 320, 520, 104)]
    for rest in itertools.product(DTYPES, (1, 2), *[(False, True)] * 3)
]


@pytest.mark.parametrize("case", BACKWARD + TAIL, ids=str)
def test_the_kernel_matches_fp64(case, request):
    target = TARGETS[getattr(case, "target", "sm_90a")]
    if request.config.getoption("--machine", target) != target:
        pytest.skip("it is for another target")
    order = request.config.getoption("--order", "early")
    case.check(case.run(Mode(**ORDERS[order])))
