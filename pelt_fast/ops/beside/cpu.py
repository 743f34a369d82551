"""A low-rank update beside a frozen layer on the C++ passes, or the library's GEMMs without C++.

Shapes and maths are those of ``reference``.
Traffic  P = one read or write of an M x K (or M x N) activation, Q = one of M x F.
         forward   x for T, base read, y written:                                3 P
         backward  dy for dT, dU and du, x for dD, base read and dx written:     4 P
         An output dropout of the model reads dy once more and writes it (2 P).
         The activation: 2 Q (gated 3) forward, 5 Q (gated 7) backward: dA is copied first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.ops.common import gradients, passes
from pelt_fast.ops.common.bundles import Down, Dropout, Transform, Up, absent
from pelt_fast.ops.common.dropout import drop as dropped


def down_forward(x: Tensor, down: Down, drop: Dropout) -> Tensor:
    return passes.down(x, *down, p=drop.dropout_p, seed=drop.seed)


def down_backward(
    dt: Tensor,
    x: Tensor,
    base: Tensor | None,
    down_weight: Tensor,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [absent(dt) for _ in range(3)]
    found = gradients.down_gradients(
        dt, x, down_weight, base, p=drop.dropout_p, seed=drop.seed, need_dx=needs[0],
        need_da=needs[1],
    )  # fmt: skip
    gradients.fill(grads, [0, 1], found)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    return tuple(grads)


def up_forward(
    base: Tensor,
    t: Tensor,
    up: Up,
    transform: Transform,
    output_dropout_p: float,
    output_seed: Tensor | None,
) -> Tensor:
    name, scale, p, seed = transform
    h = t if name == "identity" and seed is None else passes.activate(name, t, p=p, seed=seed)
    return passes.up(base, h, *up, scale, p=output_dropout_p, seed=output_seed)


def up_backward(
    dy: Tensor,
    t: Tensor,
    up_weight: Tensor,
    transform: Transform,
    output_dropout_p: float,
    output_seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [absent(dy) for _ in range(4)]
    if needs[0]:
        grads[0] = dropped(dy, output_dropout_p, output_seed)
    found = gradients.bottleneck_gradients(
        dy, t, up_weight, transform, need_dt=needs[1], need_db=needs[2], need_bias=needs[3]
    )
    gradients.fill(grads, [1, 2, 3], found)
    return tuple(grads)


def activation_forward(pre: Tensor, gate: Tensor | None, activation: str, drop: Dropout) -> Tensor:
    first, linear = (pre, None) if gate is None else (gate, pre)
    return passes.activate(activation, first, linear=linear, p=drop.dropout_p, seed=drop.seed)


def activation_backward(
    da: Tensor, pre: Tensor, gate: Tensor | None, activation: str, drop: Dropout
) -> tuple[Tensor, Tensor]:
    mask = dict(p=drop.dropout_p, seed=drop.seed)
    d_pre = da.clone(memory_format=torch.contiguous_format)  # the pass writes over its gradient
    if gate is None:
        return gradients.activation_backward(activation, d_pre, pre, **mask), absent(da)
    d_gate = torch.empty_like(d_pre)
    gradients.activation_backward(activation, d_pre, gate, linear=pre, dt=d_gate, **mask)
    return d_pre, d_gate
