"""LoRA on the library's GEMM and the C++ passes: the *accumulate* plan.

Shapes and maths are those of ``reference``.
Traffic  P = one read or write of an M x K (or M x N) activation. The sums include the frozen GEMM's
         own 2 P each way. In brackets: with the C++ ops.
         forward   x for S, y read and written for the update:                     5 P
         backward  dy for dS, dy for dB, x for dA, dx read and written again:       7 P (6)
Flops    2MR(K + N) forward, 4MR(K + N) backward beside 2MNK each.
"""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common.bundles import Bottleneck, Dropout, FrozenLinear, LowRank, absent
from pelt_fast.ops.common.gradients import down_gradients, fill, product, up_gradients
from pelt_fast.ops.common.passes import down, few_update, takes_few, up


def lora_forward(
    x: Tensor, linear: FrozenLinear, factors: LowRank, drop: Dropout
) -> tuple[Tensor, Tensor]:
    lora_a, lora_b, scale = factors
    y = F.linear(x, *linear)  # as the base does it: an update of zero changes no bit
    pair = Bottleneck(lora_a, None, lora_b, None)
    if drop.seed is None and takes_few(x, pair):
        s = x.new_empty(x.shape[0], lora_a.shape[0])
        return few_update(y, x, pair, scale, t=s, in_place=True), s
    s = down(x, lora_a, p=drop.dropout_p, seed=drop.seed)
    return up(y, s, lora_b, scale=scale, in_place=True), s


def lora_step(x: Tensor, linear: FrozenLinear, factors: LowRank) -> Callable | None:
    """What runs inputs of the shape of x (..., K) without autograd and dropout, checked here once;
    None if C++ does not take them."""
    lora_a, lora_b, scale = factors
    pair, outputs, inputs = Bottleneck(lora_a, None, lora_b, None), lora_b.shape[0], x.shape[-1]
    if not takes_few(x.reshape(-1, inputs), pair):
        return None

    def step(x: Tensor) -> Tensor:
        y = F.linear(x, *linear)
        few_update(y.view(-1, outputs), x.reshape(-1, inputs), pair, scale, in_place=True)
        return y

    return step


def lora_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    factors: LowRank,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    lora_a, lora_b, scale = factors
    grads = [absent(dy) for _ in range(3)]
    need_ds = needs[0] or needs[1]
    ds, db, _ = up_gradients(
        dy, s if needs[2] else None, lora_b, scale, need_dh=need_ds, need_bias=False
    )
    fill(grads, [2], [db])
    if need_ds:
        dx = product(dy, weight) if needs[0] else None
        found = down_gradients(
            ds, x, lora_a, dx, p=drop.dropout_p, seed=drop.seed, need_dx=needs[0],
            need_da=needs[1], in_place=True,
        )  # fmt: skip
        fill(grads, [0, 1], found)
    return tuple(grads)
