"""The rows of a matrix that a part of it has."""

import pytest
import torch
from torch import nn

import pelt_fast
from benchmarks.architectures import tiny
from pelt_fast.modules.joined_projection import JoinedProjection
from pelt_fast.modules.projection_view import shape_of, view_of
from tests.small import randomise


@pytest.mark.parametrize("name, rows", [
    ("q=0-2", [0, 1]), ("k=2-4%6", [2, 3, 8, 9]), ("v=4-6%6", [4, 5, 10, 11]), ("1/3", [4, 5, 6, 7]),
])  # fmt: skip
def test_the_rows_of_a_part(name, rows):
    owner = nn.Linear(3, 12)
    part = view_of(owner, name, None)
    assert shape_of(part) == (len(rows), 3)
    assert torch.equal(part.weight, owner.weight[rows]) and torch.equal(part.bias, owner.bias[rows])
    value = torch.randn(len(rows), 3)
    before = part.write("weight", value)
    assert torch.equal(owner.weight[rows], value)
    part.write("weight", before)
    assert torch.equal(part.weight, before)


def test_rows_that_are_apart_are_no_tensor_and_make_the_same_bits():
    """A tensor of indices would stay on the CPU, and be moved in each forward."""
    model = tiny.model("gpt_neox", tiny.families()["gpt_neox"][1])
    model = randomise(pelt_fast.inject(model, "lora"))
    joined = next(m for m in model.modules() if isinstance(m, JoinedProjection))
    parts = list(joined.children())
    assert all(part.which.period < part.which.outputs for part in parts)
    for part in parts:
        assert not any(isinstance(value, torch.Tensor) for value in vars(part.which).values())
        b, index = part.pelt_lora.lora_b, part.rows
        whole, dy = torch.zeros(part.which.outputs, b.shape[1]), torch.randn(part.which.outputs, 1)
        again = part.which.among_zeros(b)
        assert torch.equal(again, whole.index_copy(0, index, b))
        (gradient,) = torch.autograd.grad((again * dy).sum(), b)
        assert torch.equal(gradient, dy.expand_as(whole)[index])


def test_rows_that_do_not_repeat_to_the_end_are_refused():
    with pytest.raises(ValueError, match=r"'0-2%5' of a matrix of 12 rows: .* no multiple of 5"):
        view_of(nn.Linear(3, 12), "q=0-2%5", None)
