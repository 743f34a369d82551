"""The widened block on a GPU: two library GEMMs and one two-segment kernel each way.

Shapes and maths are those of ``reference``; P = one M x N pass, Q = one M x F pass.
Traffic  forward    [W1; D] is one GEMM that reads x once; one pass 2 Q makes A and H, at inference
                    in place; [W2 | s U] is one GEMM. With an output dropout: W2, then one pass
                    over y for the dropout and the rank update (2 P; at large ranks 4 P,
                    ``kernels.rank_update``).
         backward   output dropout of dy 2 P; dA and dH into the columns of d_pre (packed: one
                    GEMM); one pass 3 Q in place; one GEMM [dZ | dT] [W1; D] for dx.
         If the adapter reads another tensor: W1 and D are two GEMMs each way.
Flops    (F + R) / F of the frozen block's, plus 2MR(K + N) for the two weight gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast.kernels.config import fused_rank
from pelt_fast.kernels.mask import dropout
from pelt_fast.kernels.rank_up import rank_up_bwd
from pelt_fast.kernels.rank_update import rank_update
from pelt_fast.kernels.widened_ffn import widened_act, widened_act_bwd
from pelt_fast.ops.common.bundles import (
    Bottleneck,
    Dropout,
    FFNMatrices,
    FFNSettings,
    FrozenFFN,
    Packed,
    absent,
)
from pelt_fast.ops.common.dropout import ffn_dropouts
from pelt_fast.ops.common.gradients import stacked_input_gradient, weight_gradient
from pelt_fast.ops.common.passes import (
    activation_buffer,
    packed_product,
    stacked_linear,
    summed_bias,
)

PADDING = 16  # a divisor of the activation buffer's columns: rows stay aligned for the tensor cores


def ffn_forward(
    x: Tensor,
    adapter_x: Tensor | None,
    ffn: FrozenFFN,
    adapter: Bottleneck,
    packed: Packed,
    settings: FFNSettings,
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    pre = stacked_linear(x, adapter_x, ffn, adapter, packed.packed)
    inner, rank = ffn.in_weight.shape[0], adapter.down_weight.shape[0]
    gated, scale = ffn.gate_weight is not None, settings.scale
    hidden_drop, inner_drop, output_drop = ffn_dropouts(settings)
    act = activation_buffer(pre, inner, rank + -rank % PADDING, gated, keep_pre)
    widened_act(
        pre, act, inner, rank, gated=gated, ffn_activation=settings.ffn_activation,
        activation=settings.activation, dropout_p=settings.dropout_p,
        activation_dropout_p=settings.activation_dropout_p, seed_h=hidden_drop.seed,
        seed_a=inner_drop.seed,
    )  # fmt: skip
    pre = pre if keep_pre else absent(pre)
    if output_drop.seed is None and packed.packed_out is not None:
        bias = summed_bias(ffn.out_bias, adapter.up_bias, scale, x.dtype)
        return packed_product(act, packed.packed_out, bias), pre
    a, h = act[:, :inner], act[:, inner : inner + rank]
    return _output(a, h, ffn, adapter, output_drop, scale), pre


def _output(
    a: Tensor, h: Tensor, ffn: FrozenFFN, adapter: Bottleneck, drop: Dropout, scale: float
) -> Tensor:
    """y = drop(A W2ᵀ + b2) + s (H Uᵀ + u), by two products."""
    bias, up_bias = ffn.out_bias, adapter.up_bias
    if drop.seed is None and h.shape[1] > fused_rank("rank_up", h.device):
        bias, up_bias = summed_bias(bias, up_bias, scale, a.dtype), None  # the product adds both
    return rank_update(
        h, adapter.up_weight, F.linear(a, ffn.out_weight, bias), scale=scale, bias=up_bias,
        dropout_p=drop.dropout_p, seed=drop.seed, in_place=True,
    )  # fmt: skip


def ffn_backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    weights: FFNMatrices,
    packed: Packed,
    settings: FFNSettings,
    separate: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    down_weight, rank = weights.down_weight, weights.down_weight.shape[0]
    grads = [absent(dy) for _ in range(6)]
    blocks = 1 if weights.gate_weight is None else 2
    first = weights.in_weight.shape[0] * blocks
    if not needs[0] and pre.shape[1] != rank:
        pre = pre[:, first : first + rank]
    first = first if needs[0] else 0
    d_pre = pre.new_empty(pre.shape) if any(needs[:3]) or needs[5] else None
    through = _through_kernel if rank <= fused_rank("rank_up_bwd", dy.device) else _through_library
    grads[3], grads[4] = through(dy, pre, d_pre, weights, packed.packed_out, settings, needs)
    dt = None if d_pre is None else d_pre[:, first : first + rank]
    if needs[1]:
        grads[1] = weight_gradient(dt, x, down_weight.dtype)
    if needs[2]:
        grads[2] = dt.sum(0, dtype=down_weight.dtype)
    if needs[5]:
        grads[5] = dt @ down_weight.to(dy.dtype)
    if needs[0]:
        grads[0] = stacked_input_gradient(d_pre, weights, packed.packed, separate)
    return tuple(grads)


def _segments(weights: FFNMatrices, settings: FFNSettings, need_dx: bool) -> tuple[int, int, dict]:
    """F (0 if there are only the bottleneck's columns), the first of these columns, and the
    keywords of the two-segment kernel."""
    hidden_drop, inner_drop, _ = ffn_dropouts(settings)
    gated = weights.gate_weight is not None and need_dx
    inner = weights.in_weight.shape[0] if need_dx else 0
    keywords = dict(
        gated=gated, ffn_activation=settings.ffn_activation, seed_h=hidden_drop.seed,
        activation_dropout_p=settings.activation_dropout_p,
        seed_a=inner_drop.seed if need_dx else None, activation=settings.activation,
        dropout_p=settings.dropout_p,
    )  # fmt: skip
    return inner, inner * (2 if gated else 1), keywords


def _block_gradient(
    dy: Tensor, d_pre: Tensor, first: int, out_weight: Tensor, settings: FFNSettings
) -> None:
    """dA = drop(dy) W2 into its columns of ``d_pre``."""
    _, _, output_drop = ffn_dropouts(settings)
    inner = out_weight.shape[1]
    torch.mm(dropout(dy, *output_drop), out_weight, out=d_pre[:, first - inner : first])


def _through_kernel(
    dy: Tensor,
    pre: Tensor,
    d_pre: Tensor | None,
    weights: FFNMatrices,
    packed_out: Tensor | None,
    settings: FFNSettings,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Fill ``d_pre`` with one read of dy for dT, dU and du; return dU and du."""
    rank = weights.down_weight.shape[0]
    inner, first, keywords = _segments(weights, settings, needs[0])
    if needs[0]:
        _block_gradient(dy, d_pre, first, weights.out_weight, settings)
    found = None, None, None
    if d_pre is not None or needs[3] or needs[4]:
        found = rank_up_bwd(
            dy, pre[:, first : first + rank], weights.up_weight, scale=settings.scale,
            activation=settings.activation, dropout_p=settings.dropout_p,
            seed=keywords["seed_h"], need_dt=d_pre is not None, need_db=needs[3],
            need_bias=needs[4], dt=None if d_pre is None else d_pre[:, first : first + rank],
        )  # fmt: skip
    if needs[0]:
        widened_act_bwd(
            d_pre, pre, None, inner, rank, bottleneck_done=True, scale=settings.scale, **keywords
        )
    return tuple(absent(dy) if grad is None else grad for grad in found[1:])


def _through_library(
    dy: Tensor,
    pre: Tensor,
    d_pre: Tensor | None,
    weights: FFNMatrices,
    packed_out: Tensor | None,
    settings: FFNSettings,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Fill ``d_pre`` by the library's GEMMs; if packed, one GEMM makes dA and s dH."""
    rank, up_weight, scale = weights.down_weight.shape[0], weights.up_weight, settings.scale
    inner, first, keywords = _segments(weights, settings, needs[0])
    _, _, output_drop = ffn_dropouts(settings)
    in_one = needs[0] and packed_out is not None and output_drop.seed is None
    if in_one:
        columns = d_pre[:, first - inner : first + rank]
        torch.mm(dy, packed_out[:, : inner + rank], out=columns)
    elif needs[0]:
        _block_gradient(dy, d_pre, first, weights.out_weight, settings)
    if d_pre is not None and not in_one:
        torch.mm(dy, up_weight.to(dy.dtype), out=d_pre[:, first : first + rank])
    h = dy.new_empty(dy.shape[0], rank) if needs[3] else None
    if d_pre is not None or needs[3]:
        scaled = 1.0 if in_one else scale
        widened_act_bwd(d_pre, pre, h, inner, rank, scale=scaled, **keywords)
    d_up = weight_gradient(dy, h, up_weight.dtype).mul_(scale) if needs[3] else absent(dy)
    d_bias = dy.sum(0, dtype=up_weight.dtype).mul_(scale) if needs[4] else absent(dy)
    return d_up, d_bias
