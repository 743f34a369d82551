"""The adapter on the Triton kernels.

Shapes and maths are those of ``reference``.
Traffic  P = one read or write of an M x K (or M x N) activation. Workspaces: the kernels' own.
         forward   x, base, y, in one kernel (LayerNorm in: x again from the L2): 3 P
         backward  dy for dT, dU and du together, x for dD, dx written; sequential: dy again
                   3-4 P; LayerNorm in: x again for dx, and its rows for their moments 4-6 P
An adapter with a LayerNorm on its update runs ``cpu``. Above the ranks of ``config.fused_rank`` the
product is large enough for the library's GEMM, except a product after a LayerNorm: our kernel runs
it at every rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pelt_fast.kernels.adapter import adapter as adapter_kernel
from pelt_fast.kernels.config import fused_rank, processors
from pelt_fast.kernels.norm import moments, norm_bwd, norm_gradients
from pelt_fast.kernels.rank_down import rank_down, rank_down_bwd
from pelt_fast.kernels.rank_up import rank_up, rank_up_bwd
from pelt_fast.kernels.rank_update import rank_update
from pelt_fast.ops.common.bundles import AdapterNorm, Bottleneck, Transform, absent
from pelt_fast.ops.common.gradients import bottleneck_gradients

ROWS_A_PROCESSOR = 32


def fills_device(x: Tensor) -> bool:
    """Whether one program for each block of rows keeps the device busy. With fewer rows, two
    kernels run that also split K."""
    return x.shape[0] >= ROWS_A_PROCESSOR * processors(x.device)


def adapter_forward(
    x: Tensor,
    base: Tensor | None,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    keep_t: bool,
) -> tuple[Tensor, Tensor]:
    rank, normed = adapter.down_weight.shape[0], norm.layer_norm == "in"
    if norm.layer_norm == "out" or (rank > fused_rank("adapter", x.device) and not normed):
        return NotImplemented
    activation, scale, dropout_p, seed = transform
    base = x if base is None else base
    weights = (norm.norm_weight, norm.norm_bias)
    if rank <= fused_rank("adapter", x.device) and fills_device(x):
        y, t = adapter_kernel(
            x, base, *adapter, norm=weights if normed else None, activation=activation,
            scale=scale, dropout_p=dropout_p, seed=seed, keep_t=keep_t,
        )  # fmt: skip
        return y, t if keep_t else absent(x)
    t, h = rank_down(
        x, *adapter[:2], activation=activation, h_dropout_p=dropout_p, h_seed=seed,
        norm=(moments(x), *weights) if normed else None,
    )  # fmt: skip
    y = rank_update(h, adapter.up_weight, base, scale=scale, bias=adapter.up_bias)
    return y, t if keep_t else absent(x)


def adapter_backward(
    dy: Tensor,
    x: Tensor,
    t: Tensor,
    adapter: Bottleneck,
    norm: AdapterNorm,
    transform: Transform,
    sequential: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    by_kernels = adapter.down_weight.shape[0] <= fused_rank("rank_up_bwd", dy.device)
    if norm.layer_norm == "out" or (norm.layer_norm == "none" and not by_kernels):
        return NotImplemented
    wanted = dict(
        need_dt=needs[0] or needs[1] or needs[2] or needs[5] or needs[6], need_db=needs[3],
        need_bias=needs[4],
    )  # fmt: skip
    if by_kernels:
        dt, *found = rank_up_bwd(dy, t, adapter.up_weight, **transform._asdict(), **wanted)
    else:
        dt, *found = bottleneck_gradients(dy, t, adapter.up_weight, transform, **wanted)
    found = dict(zip((3, 4), found))
    if norm.layer_norm == "in":
        residual = dy if sequential else None
        found |= _through_norm(dt, t, x, adapter, norm, residual, needs)
    else:
        found |= _down_gradients(dy, dt, x, adapter.down_weight, sequential, needs)
    grads = [absent(dy) for _ in range(7)]
    for i, grad in found.items():
        grads[i] = grad if needs[i] else grads[i]
    return tuple(grads)


def _through_norm(
    dt: Tensor,
    t: Tensor,
    x: Tensor,
    adapter: Bottleneck,
    norm: AdapterNorm,
    residual: Tensor | None,
    needs: Sequence[bool],
) -> dict[int, Tensor]:
    """Gradients of an adapter that reads a LayerNorm of x, by their index."""
    found, weights = {}, (norm.norm_weight, norm.norm_bias)
    if needs[0]:
        found[0], own = norm_bwd(dt, t, x, *adapter[:2], *weights, residual)
    if any((needs[1], needs[2], needs[5], needs[6])):
        own = own if needs[0] else moments(x)
        found |= zip((1, 2, 5, 6), norm_gradients(dt, x, own, adapter.down_weight, *weights))
    return found


def _down_gradients(
    dy: Tensor,
    dt: Tensor,
    x: Tensor,
    down_weight: Tensor,
    sequential: bool,
    needs: Sequence[bool],
) -> dict[int, Tensor]:
    """Gradients of x, down_weight and down_bias, by their index."""
    found = {}
    if needs[1]:
        found[1], found[2] = rank_down_bwd(dt, x, down_weight.dtype, with_bias=needs[2])
    elif needs[2]:
        found[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[0] and sequential:
        found[0] = rank_up(dt, down_weight.t(), dy)
    elif needs[0]:
        found[0] = torch.mm(dt, down_weight.to(dt.dtype))
    return found
