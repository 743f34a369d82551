"""Few rows of a widened block: with and without gradients the same bits, and the right gradients."""

import pytest
import torch

from pelt_fast import functional
from pelt_fast.ops.common import native, passes

from .exactly import close

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason="needs the C++ ops")
K, INNER, N, R = 24, 40, 20, 5
TRAINED = ("x", "down_weight", "down_bias", "up_weight", "up_bias")


def drawn(rows: int, gated: bool, separate: bool) -> dict:
    torch.manual_seed(rows)
    shapes = dict(
        x=(rows, K), in_weight=(INNER, K), in_bias=(INNER,), out_weight=(N, INNER), out_bias=(N,),
        down_weight=(R, K), down_bias=(R,), up_weight=(N, R), up_bias=(N,),
    )  # fmt: skip
    if gated:
        shapes |= dict(gate_weight=(INNER, K), gate_bias=(INNER,))
    if separate:
        shapes["adapter_x"] = (rows, K)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("separate", [False, True], ids=["", "adapter_x"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows", [1, 8, 9, passes.MAX_FEW, passes.MAX_FEW + 1])
def test_a_forward_without_gradients_has_the_bits_of_one_with_them(rows, gated, separate):
    tensors = drawn(rows, gated, separate)
    trained = TRAINED + (("adapter_x",) if separate else ())

    def run(given: dict) -> torch.Tensor:
        return functional.ffn_parallel_adapter(**given, scale=2.0)

    leaves = tensors | {name: tensors[name].requires_grad_() for name in trained}
    y = run(leaves)
    with torch.no_grad():
        assert torch.equal(run(tensors), y)
    wide = {name: tensor.detach().double() for name, tensor in tensors.items()}
    wide |= {name: wide[name].requires_grad_() for name in trained}
    exact = run(wide)
    close(y.detach(), exact.detach(), 4 * INNER)
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, [leaves[name] for name in trained], dy)
    wanted = torch.autograd.grad(exact, [wide[name] for name in trained], dy.double())
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 16 * INNER)
