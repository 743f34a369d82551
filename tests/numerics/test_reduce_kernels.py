"""The second stage of the reductions: several sums in one launch."""

import pytest
import torch

from pelt_fast.kernels.reduce import reduce_groups, reduce_parts

from .judge import DTYPES, dense

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# J, P, Q of each group: nothing divides anything, a size of 1, more parts than are loaded at once
SHAPES = [
    [(1, 1, 1)],
    [(3, 5, 7), (17, 9, 3)],
    [(4, 70, 16), (64, 40, 16), (64, 1, 40)],
    [(9, 37, 130), (8, 1, 1), (1, 1, 513)],
]


def outputs(shapes: list[tuple], dtype: torch.dtype, padding: int = 0) -> list[torch.Tensor]:
    """The first in ``dtype``, with ``padding`` between its rows, the others in fp32."""
    (_, P, Q), *others = shapes
    first = dense(P, Q + padding, dtype=dtype)[:, :Q]
    return [first, *(dense(*shape[1:]) for shape in others)]


@every_dtype
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_several_sums_in_one_launch_have_the_same_bits_as_apart(shapes, dtype, padding):
    parts = [dense(*shape) for shape in shapes]
    apart, together = (outputs(shapes, dtype, padding) for _ in range(2))
    for part, out in zip(parts, apart):
        reduce_parts(part, out, scale=0.3)
    reduce_groups(list(zip(parts, together)), scale=0.3)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


def test_absent_sums_leave_the_others_their_bits():
    shapes = [(4, 70, 16), (64, 40, 16), (64, 1, 40)]
    parts, apart = [dense(*shape) for shape in shapes], outputs(shapes, torch.float32)
    for part, out in zip(parts, apart):
        reduce_parts(part, out)
    for present in range(8):
        chosen = [bool(present >> i & 1) for i in range(3)]
        given = [part if here else None for part, here in zip(parts, chosen)]
        together = [out.fill_(torch.nan) for out in outputs(shapes, torch.float32)]
        reduce_groups(list(zip(given, together)))
        for one, other, here in zip(apart, together, chosen, strict=True):
            assert torch.equal(one, other) if here else other.isnan().all()
    empty = dense(4, 0, 16), dense(0, 16)
    reduce_groups([empty, (parts[1], together[1].zero_()), (None, None)])
    assert torch.equal(apart[1], together[1])


def test_a_sum_of_negative_zeros_has_the_same_sign():
    parts = torch.full((3, 1, 40), -0.0, device=dense(1).device)
    apart, together = dense(1, 40), dense(1, 40)
    reduce_parts(parts, apart)
    reduce_groups([(parts, together)])
    assert torch.equal(apart.signbit(), together.signbit())
