"""A low-rank update beside a frozen layer on the Triton kernels.

Shapes and maths are those of ``reference``.
Traffic  P = one read or write of an M x K (or M x N) activation, Q = one of M x F. Workspaces: the
         kernels' own.
         forward   x for T; base read and y written by rank_up, which drops base too:  3 P
         backward  dy for dT, dU and du together, x for dD, base read, dx written:      4 P
                   With dropout on x the mask is made once, as bits (P / 16), and read twice.
                   An output dropout of the model reads dy once more and writes it (2 P).
         The activation: 2 Q (gated 3) forward, 3 Q (gated 5) backward.
Above the ranks of ``config.fused_rank`` the product is large enough for the library's GEMM
(``kernels.rank_update``).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.kernels.config import fused_rank
from pelt_fast.kernels.ffn_act import ffn_act, ffn_act_bwd
from pelt_fast.kernels.mask import dropout, mask_bits
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.rank_update import rank_update
from pelt_fast.kernels.widened_ffn import widened_act
from pelt_fast.ops.common.bundles import Down, Dropout, Transform, Up, absent
from pelt_fast.ops.common.gradients import bottleneck_gradients, weight_gradient


def down_forward(x: Tensor, down: Down, drop: Dropout) -> Tensor:
    weight, bias = down
    if drop.seed is None and weight.shape[0] > fused_rank("rank_down", x.device):
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return rank_down(x, weight, bias, dropout_p=drop.dropout_p, seed=drop.seed)[0]


def down_backward(
    dt: Tensor,
    x: Tensor,
    base: Tensor | None,
    down_weight: Tensor,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    (p, seed), (rank, width) = drop, down_weight.shape
    grads, bits = [absent(dt) for _ in range(3)], None
    if seed is not None and needs[0] and needs[1] and width % 8 == 0:
        bits = mask_bits(seed, p, dt.shape[0], width)
    if needs[0]:
        grads[0] = _input_gradient(dt, base, down_weight, drop, bits)
    if needs[1] and seed is None and rank > fused_rank("rank_down_bwd", dt.device):
        grads[1] = weight_gradient(dt, x, down_weight.dtype)
    elif needs[1]:
        mask = dict(dropout_p=p, seed=seed, bits=bits)
        grads[1], _ = rank_down_bwd(dt, x, down_weight.dtype, **mask)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    return tuple(grads)


def _input_gradient(
    dt: Tensor, base: Tensor | None, down_weight: Tensor, drop: Dropout, bits: Tensor | None
) -> Tensor:
    """dx = base + drop_x(dT D)."""
    low = down_weight.to(dt.dtype)
    if base is None:
        return dropout(dt @ low, *drop)
    if drop.seed is None and low.shape[0] > fused_rank("rank_up", dt.device):
        return torch.addmm(base, dt, low)
    mask = dict(update_dropout_p=drop.dropout_p, seed=drop.seed, bits=bits)
    return rank_up(dt, down_weight.t(), base, **mask)


def up_forward(
    base: Tensor,
    t: Tensor,
    up: Up,
    transform: Transform,
    output_dropout_p: float,
    output_seed: Tensor | None,
) -> Tensor:
    return rank_update(
        _activated(t, transform), up.up_weight, base, scale=transform.scale, bias=up.up_bias,
        dropout_p=output_dropout_p, seed=output_seed,
    )  # fmt: skip


def _activated(t: Tensor, transform: Transform) -> Tensor:
    """H = drop(f(T)): the bottleneck's segment of the kernel of the widened block, alone."""
    name, _, p, seed = transform
    if name == "identity" and seed is None:
        return t
    h = torch.empty_like(t)
    widened_act(
        t, h, 0, t.shape[1], gated=False, ffn_activation="identity", activation=name, dropout_p=p,
        seed_h=seed,
    )  # fmt: skip
    return h


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
        grads[0] = dropout(dy, output_dropout_p, output_seed)
    wanted = dict(need_dt=needs[1], need_db=needs[2], need_bias=needs[3])
    found = (None,) * 3
    if up_weight.shape[1] > fused_rank("rank_up_bwd", dy.device):
        found = bottleneck_gradients(dy, t, up_weight, transform, **wanted)
    elif any(needs[1:]):
        found = rank_up_bwd(dy, t, up_weight, **transform._asdict(), **wanted)
    for i, grad in enumerate(found, 1):
        grads[i] = grads[i] if grad is None else grad
    return tuple(grads)


def activation_forward(pre: Tensor, gate: Tensor | None, activation: str, drop: Dropout) -> Tensor:
    return ffn_act(pre, gate, activation, dropout_p=drop.dropout_p, seed=drop.seed)


def activation_backward(
    da: Tensor, pre: Tensor, gate: Tensor | None, activation: str, drop: Dropout
) -> tuple[Tensor, Tensor]:
    found = ffn_act_bwd(da, pre, gate, activation, dropout_p=drop.dropout_p, seed=drop.seed)
    return found[0], absent(da) if found[1] is None else found[1]
