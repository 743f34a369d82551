"""The public function of the widened block: arguments are checked, then the op runs."""

from torch import Tensor

from pelt_fast.ops.common import arguments as check
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.activations import ACTIVATIONS
from pelt_fast.ops.common.bundles import Bottleneck, FFNSettings, FrozenFFN
from pelt_fast.ops.common.learned_scale import fold_scale

from .op import Buffers, Stacked, widened_ffn


def ffn_parallel_adapter(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    adapter_x: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    ffn_activation: str = "gelu",
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    activation_dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    packed: Tensor | None = None,
    packed_out: Tensor | None = None,
    packings: Buffers | None = None,
    training: bool = True,
) -> Tensor:
    """A frozen FFN and its parallel adapter as one wider FFN (docs/maths.md#i3, paper section 3.3).

    ``drop_o(drop_a(φ(x W1ᵀ + b1)) W2ᵀ + b2) + scale * (drop(f(x' Dᵀ + d)) Uᵀ + u)``; with
    ``gate_weight`` the inner part is ``φ(x Wgᵀ + bg) * (x W1ᵀ + b1)``. x' is x, or ``adapter_x``.

    Args:
        x: the input of the block (..., K).
        in_weight: W1 (F, K), frozen, of x's dtype.
        in_bias: b1 (F), frozen, or None.
        out_weight: W2 (N, F), frozen.
        out_bias: b2 (N), frozen, or None.
        down_weight: D (R, K), of x's dtype or wider.
        down_bias: d (R), or None.
        up_weight: U (N, R).
        up_bias: u (N), or None.
        adapter_x: the input of the adapter (..., K), if it is not the block's input but the
            residual stream before a pre-norm.
        gate_weight: Wg (F, K) of a gated block, frozen.
        gate_bias: bg (F), frozen, or None.
        ffn_activation: φ: "identity", "relu", "gelu", "gelu_tanh", "silu" or "tanh".
        activation: f, one of the same.
        scale: a number, or a learned scale of shape (), (1,) or (N,).
        dropout_p: the dropout probability of the bottleneck, in [0, 1).
        activation_dropout_p: the one of the model, after φ.
        output_dropout_p: the one of the model, on the block's output.
        packed: [gate_weight; in_weight; down_weight; zeros] stacked (F + R or more, K): one GEMM
            then reads x once. Not with an ``adapter_x``. It is saved for backward and must not
            change before backward.
        packed_out: [out_weight | scale * up_weight | zeros] side by side (N, F + R or more):
            without an output dropout, one GEMM then writes y once. Saved for backward, too.
        packings: instead of both, buffers that hold the frozen weights. Each call fills them
            with its adapter's weights.
        training: whether the dropouts act.

    Returns:
        The block's output with the update added (..., N).

    Raises:
        TypeError: an argument is no tensor, or of another dtype; the message names it.
        ValueError: an argument has another shape, device or value, or a frozen weight requires a
            gradient, which the function does not compute; the message names it.

    Saved:
        For backward: x' and the pre-activations, M x (K + F + R) elements; if x needs no gradient,
        M x (K + R).

    Example:
        >>> x, w1, w2 = torch.randn(2, 5, 16), torch.randn(32, 16), torch.randn(16, 32)
        >>> down_weight, up_weight = torch.randn(4, 16), torch.zeros(16, 4)
        >>> ffn_parallel_adapter(x, w1, None, w2, None, down_weight, None, up_weight, None).shape
        torch.Size([2, 5, 16])
    """
    check.activation_tensor("x", x, 1)
    x, *frozen, adapter_x, packed, packed_out = check.cast(
        x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias, adapter_x, packed,
        packed_out,
    )  # fmt: skip
    ffn = FrozenFFN(*frozen)
    weights = Bottleneck(down_weight, down_bias, up_weight, up_bias)
    stacked = Stacked(packed, packed_out, packings)
    _check_block(x, adapter_x, ffn, stacked)
    check.bottleneck(x, ffn.out_weight.shape[0], weights, activation, scale)
    _check_stacked(x, adapter_x, ffn, weights.down_weight.shape[0], stacked)
    check.choice("ffn_activation", ffn_activation, ACTIVATIONS)
    probabilities = dict(dropout_p=dropout_p, activation_dropout_p=activation_dropout_p,
                         output_dropout_p=output_dropout_p)  # fmt: skip
    for name, p in probabilities.items():
        check.probability(name, p)
    dispatch.announce("ffn", x.device)
    if isinstance(scale, Tensor):
        weights = Bottleneck(*weights[:2], *fold_scale(scale, *weights[2:]))
        scale = 1.0
    settings = FFNSettings(
        ffn_activation, activation, float(scale), float(dropout_p), float(activation_dropout_p),
        float(output_dropout_p), None,
    )  # fmt: skip
    return widened_ffn(x, adapter_x, ffn, weights, stacked, settings, training)


def _check_block(x: Tensor, adapter_x: Tensor | None, ffn: FrozenFFN, stacked: Stacked) -> None:
    """Check the frozen block's weights and the adapter's input."""
    inputs = x.shape[-1]
    check.tensor("in_weight", ffn.in_weight, ("F", inputs), x)
    inner = ffn.in_weight.shape[0]
    check.tensor("in_bias", ffn.in_bias, (inner,), x, optional=True)
    check.tensor("gate_weight", ffn.gate_weight, (inner, inputs), x, optional=True)
    check.tensor("gate_bias", ffn.gate_bias, (inner,), x, optional=True)
    check.tensor("out_weight", ffn.out_weight, ("N", inner), x)
    check.tensor("out_bias", ffn.out_bias, (ffn.out_weight.shape[0],), x, optional=True)
    check.tensor("adapter_x", adapter_x, x.shape, x, optional=True)
    weights, made = ffn._asdict(), dict(packed=stacked.packed, packed_out=stacked.packed_out)
    check.same_dtype("x", x, adapter_x=adapter_x, **weights, **made)
    check.frozen(**weights)


def _check_stacked(
    x: Tensor, adapter_x: Tensor | None, ffn: FrozenFFN, rank: int, stacked: Stacked
) -> None:
    """Check the stacked weights, if the caller made them."""
    packed, packed_out, _ = stacked
    inner, channels = ffn.in_weight.shape[0], ffn.out_weight.shape[0]
    rows = inner * (1 if ffn.gate_weight is None else 2) + rank
    check.tensor("packed", packed, ("rows", x.shape[-1]), x, optional=True)
    if packed is not None and adapter_x is not None:
        raise ValueError("packed is the weights of one input, got an adapter_x beside x: leave one")
    if packed is not None and packed.shape[0] < rows:
        raise ValueError(f"packed must have at least {rows} rows, got {packed.shape[0]}")
    columns = inner + rank
    check.tensor("packed_out", packed_out, (channels, "columns"), x, optional=True)
    if packed_out is not None and packed_out.shape[1] < columns:
        raise ValueError(
            f"packed_out must have at least {columns} columns, got {packed_out.shape[1]}"
        )
