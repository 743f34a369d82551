"""Faults of compiled kernels that are avoided, executed as they were: ``test_kernels.py`` runs this.

``pytest -p tests.ptx.plugin --machine sm90 tests/ptx/known_races.py``
"""

from dataclasses import replace

import pytest
import torch

from pelt_fast.kernels import config
from pelt_fast.kernels.rank_down import rank_down_parts
from tests.numerics.judge import dense

from .errors import Race

M, K, R = 256, 256, 64


def test_two_stages_of_a_normed_product_overwrite_operands_in_flight(request):
    """On sm_90 alone: there the table has one stage."""
    x, ds = (dense(M, width, dtype=torch.bfloat16) for width in (K, R))
    moments = torch.stack([x.float().mean(1), 1 / x.float().std(1)])
    table = "rank_down_bwd_norm"
    tile = config.pick(table, 16, R, x.device)
    assert rank_down_parts(ds, x, moments=moments).isfinite().all()
    if request.config.getoption("--machine") == "sm90":
        assert tile.num_stages == 1
        with config.forced(table, replace(tile, num_stages=2)), pytest.raises(Race, match="wgmma"):
            rank_down_parts(ds, x, moments=moments)
