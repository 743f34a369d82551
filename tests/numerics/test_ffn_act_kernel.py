"""The activation between separate layers, forward and backward, on strided rows."""

import pytest
import torch

from pelt_fast.kernels.ffn_act import ffn_act, ffn_act_bwd
from pelt_fast.ops.beside import reference
from pelt_fast.ops.common.activations import ACTIVATIONS
from pelt_fast.ops.common.bundles import Dropout

from .judge import DTYPES, check, seed, sliced

SHAPES = [(1, 1), (5, 17), (9, 264), (3, 1030), (0, 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ffn_act_matches_fp64_oracle(shape, gated, p, dtype):
    assert_exact(shape, gated, p, dtype, "silu" if gated else "gelu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ffn_act_knows_every_activation(activation, gated):
    assert_exact((7, 40), gated, 0.2, torch.float32, activation)


def assert_exact(shape, gated, p, dtype, activation):
    drop = Dropout(p, seed() if p else None)
    z, da = sliced(*shape, dtype=dtype), sliced(*shape, dtype=dtype)
    gate = sliced(*shape, dtype=dtype) if gated else None
    keywords = dict(dropout_p=p, seed=drop.seed)
    gradients = ffn_act_bwd(da, z, gate, activation, **keywords)
    found = (ffn_act(z, gate, activation, **keywords), *gradients)
    expected = []
    for wide in (dtype, torch.float64):
        own = [None if t is None else t.to(wide) for t in (da, z, gate)]
        forward = reference.activation_forward(*own[1:], activation, drop)
        expected.append((forward, *reference.activation_backward(*own, activation, drop)))
    for actual, same, oracle in zip(found, *expected, strict=True):
        if oracle.numel():
            check(actual, same, oracle, dtype)
    assert (found[2] is None) is (gate is None)
