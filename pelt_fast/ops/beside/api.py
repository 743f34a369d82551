"""The public functions beside frozen layers: arguments are checked, then the ops run."""

from torch import Tensor

from pelt_fast.ops.common import arguments as check
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.activations import ACTIVATIONS
from pelt_fast.ops.common.arguments import Layer
from pelt_fast.ops.common.bundles import Bottleneck, FFNSettings, LowRank
from pelt_fast.ops.common.learned_scale import fold_scale

from . import op


def lora_beside(
    x: Tensor,
    layer: Layer,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``layer(x) + scale * dropout(x) lora_aᵀ lora_bᵀ`` (paper equation 6), for any layer.

    The layer computes its own product, as a quantised layer must, and its own gradient. The update
    is fused around it: one read of x before the layer, one pass over its output after it.

    Args:
        x: the layer's input (..., K).
        layer: the frozen layer, a function of x that returns (..., N).
        lora_a: A (R, K). An x in a wider dtype is cast to A's for the update.
        lora_b: B (N, R), of the dtype of the layer's output or wider.
        scale: s, which multiplies the update (alpha / R in PEFT).
        dropout_p: the probability of the dropout on the branch's input, in [0, 1).
        training: whether the dropout acts.

    Returns:
        The layer's output with the update added (..., N), in the dtype of the layer's output.

    Raises:
        TypeError: an argument is no tensor, no function, or of another dtype; the message names it.
        ValueError: an argument or the layer's output has another shape, device or value; the
            message names it.

    Saved:
        For backward: x and M x R elements, M the product of x's leading dims, with and without
        dropout; and what the layer itself saves.

    Example:
        >>> x, layer = torch.randn(2, 5, 16), torch.nn.Linear(16, 8).requires_grad_(False)
        >>> lora_a, lora_b = torch.randn(4, 16), torch.zeros(8, 4)
        >>> lora_beside(x, layer, lora_a, lora_b, scale=2.0).shape
        torch.Size([2, 5, 8])
    """
    check.activation_tensor("x", x, 1)
    check.function("layer", layer)
    check.tensor("lora_a", lora_a, ("R", x.shape[-1]), x)
    check.tensor("lora_b", lora_b, ("N", lora_a.shape[0]), x)
    check.update_scale(scale, 1)
    check.probability("dropout_p", dropout_p)
    dispatch.announce("beside", x.device)
    layer = check.checked_layer("layer", layer, x, lora_b.shape[0], lora_b=lora_b)
    return op.lora_beside(
        layer, x, LowRank(lora_a, lora_b, float(scale)), float(dropout_p), training
    )


def ffn_adapter_beside(
    x: Tensor,
    in_layer: Layer,
    out_layer: Layer,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    adapter_x: Tensor | None = None,
    gate_layer: Layer | None = None,
    ffn_activation: str = "gelu",
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    activation_dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A frozen FFN of any layers and its parallel adapter (paper section 3.3).

    The same sum as :func:`ffn_parallel_adapter`, with the same dropout masks. The projections
    compute their own products, as quantised layers must. The activation, the bottleneck and the
    output dropout are fused between them.

    Args:
        x: the input of the block (..., K).
        in_layer: the in-projection, a function of x that returns (..., F).
        out_layer: the out-projection, a function of (..., F) that returns (..., N).
        down_weight: D (R, K). An input in a wider dtype is cast to D's for the adapter.
        down_bias: d (R), or None.
        up_weight: U (N, R), of the dtype of the out-projection's output or wider.
        up_bias: u (N), or None.
        adapter_x: the input of the adapter (..., K), if it is not the block's input but the
            residual stream before a pre-norm.
        gate_layer: the gate's projection of a gated block, a function of x that returns (..., F).
        ffn_activation: φ, as for :func:`ffn_parallel_adapter`.
        activation: f, one of the same.
        scale: a number, or a learned scale of shape (), (1,) or (N,).
        dropout_p: the dropout probability of the bottleneck, in [0, 1).
        activation_dropout_p: the one of the model, after φ.
        output_dropout_p: the one of the model, on the block's output.
        training: whether the dropouts act.

    Returns:
        The block's output with the update added (..., N), in the dtype of the out-projection's.

    Raises:
        TypeError: an argument is no tensor, no function, or of another dtype; the message names it.
        ValueError: an argument or a layer's output has another shape, device or value; the message
            names it.

    Saved:
        For backward: the adapter's input and the pre-activations, M x (K + F + R) elements (gated:
        2 F); and what the layers themselves save.

    Example:
        >>> x = torch.randn(2, 5, 16)
        >>> first, second = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
        >>> down_weight, up_weight = torch.randn(4, 16), torch.zeros(16, 4)
        >>> ffn_adapter_beside(x, first, second, down_weight, None, up_weight, None).shape
        torch.Size([2, 5, 16])
    """
    check.activation_tensor("x", x, 1)
    check.function("in_layer", in_layer)
    check.function("gate_layer", gate_layer, optional=True)
    check.function("out_layer", out_layer)
    check.tensor("adapter_x", adapter_x, x.shape, x, optional=True)
    weights = Bottleneck(down_weight, down_bias, up_weight, up_bias)
    read = x if adapter_x is None else adapter_x
    check.tensor("up_weight", up_weight, ("N", "R"), x)
    check.bottleneck_shapes(read, up_weight.shape[0], weights, activation, scale)
    check.choice("ffn_activation", ffn_activation, ACTIVATIONS)
    probabilities = dict(dropout_p=dropout_p, activation_dropout_p=activation_dropout_p,
                         output_dropout_p=output_dropout_p)  # fmt: skip
    for name, p in probabilities.items():
        check.probability(name, p)
    dispatch.announce("beside", x.device)
    if isinstance(scale, Tensor):
        weights = Bottleneck(*weights[:2], *fold_scale(scale, *weights[2:]))
        scale = 1.0
    settings = FFNSettings(
        ffn_activation, activation, float(scale), float(dropout_p), float(activation_dropout_p),
        float(output_dropout_p), None,
    )  # fmt: skip
    small = dict(up_weight=up_weight, up_bias=up_bias)
    layers = op.FrozenLayers(
        check.checked_layer("in_layer", in_layer, x, "F"),
        None if gate_layer is None else check.checked_layer("gate_layer", gate_layer, x, "F"),
        check.checked_layer("out_layer", out_layer, x, up_weight.shape[0], **small),
    )
    return op.ffn_beside(x, adapter_x, layers, weights, settings, training)
