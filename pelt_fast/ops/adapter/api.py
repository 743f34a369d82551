"""The public functions of the adapter: arguments are checked, then the op runs."""

from torch import Tensor

from pelt_fast.ops.common import arguments as check
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import AdapterNorm, Bottleneck, Transform
from pelt_fast.ops.common.learned_scale import fold_scale
from pelt_fast.ops.common.library import autocasts

from .op import adapter

LAYER_NORMS = ("none", "in", "out")


def parallel_adapter(
    base_out: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    activation: str = "relu",
    layer_norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``base_out + scale * (dropout(f(x Dᵀ + d)) Uᵀ + u)`` (paper section 3.3).

    Args:
        base_out: the output of the sub-layer (..., N).
        x: its input (..., K), of base_out's dtype.
        down_weight: D (R, K), of x's dtype or wider.
        down_bias: d (R), or None.
        up_weight: U (N, R).
        up_bias: u (N), or None.
        scale: a number, or a learned scale of shape (), (1,) or (N,), whose gradient saves nothing
            of size M x N.
        activation: f: "identity", "relu", "gelu", "gelu_tanh", "silu" or "tanh".
        layer_norm: "in" normalises x, "out" the scaled update, "none" neither.
        norm_weight: the LayerNorm's weight, (K) of "in", (N) of "out".
        norm_bias: the LayerNorm's bias, of the same shape.
        dropout_p: the probability of the dropout on the bottleneck, in [0, 1).
        training: whether the dropout acts.

    Returns:
        base_out with the update added (..., N).

    Raises:
        TypeError: an argument is no tensor, or of another dtype; the message names it.
        ValueError: an argument has another shape, device or value; the message names it.

    Saved:
        For backward: x and M x R elements, M the product of x's leading dims.

    Example:
        >>> x, base_out = torch.randn(2, 5, 16), torch.randn(2, 5, 8)
        >>> down_weight, up_weight = torch.randn(4, 16), torch.zeros(8, 4)
        >>> parallel_adapter(base_out, x, down_weight, None, up_weight, None, scale=4.0).shape
        torch.Size([2, 5, 8])
    """
    check.activation_tensor("base_out", base_out, 1)
    check.activation_tensor("x", x, 1)
    if autocasts(x):
        x = x.to(base_out.dtype)  # only a residual stream keeps a wide dtype
    weights = Bottleneck(down_weight, down_bias, up_weight, up_bias)
    norm = AdapterNorm(norm_weight, norm_bias, layer_norm)
    settings = (activation, scale, dropout_p)
    return _checked(x, base_out, weights, norm, settings, training)


def sequential_adapter(
    h: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    activation: str = "relu",
    layer_norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``h + scale * (dropout(f(h Dᵀ + d)) Uᵀ + u)`` (paper equation 4).

    The tensor h is both input and residual. Its gradient is made in one accumulation.

    Args:
        h: the output of the sub-layer (..., N).
        down_weight: D (R, N), of h's dtype or wider.
        down_bias: d (R), or None.
        up_weight: U (N, R).
        up_bias: u (N), or None.
        scale: a number, or a learned scale of shape (), (1,) or (N,).
        activation: f, as for :func:`parallel_adapter`.
        layer_norm: "in" normalises h, "out" the scaled update, "none" neither.
        norm_weight: the LayerNorm's weight (N).
        norm_bias: the LayerNorm's bias (N).
        dropout_p: the probability of the dropout on the bottleneck, in [0, 1).
        training: whether the dropout acts.

    Returns:
        h with the update added (..., N).

    Raises:
        TypeError: an argument is no tensor, or of another dtype; the message names it.
        ValueError: an argument has another shape, device or value; the message names it.

    Saved:
        For backward: h and M x R elements, M the product of h's leading dims.

    Example:
        >>> h, down_weight, up_weight = torch.randn(2, 8), torch.randn(4, 8), torch.zeros(8, 4)
        >>> sequential_adapter(h, down_weight, None, up_weight, None).shape
        torch.Size([2, 8])
    """
    check.activation_tensor("h", h, 1)
    weights = Bottleneck(down_weight, down_bias, up_weight, up_bias)
    norm = AdapterNorm(norm_weight, norm_bias, layer_norm)
    settings = (activation, scale, dropout_p)
    return _checked(h, None, weights, norm, settings, training)


def _checked(
    x: Tensor,
    base: Tensor | None,
    weights: Bottleneck,
    norm: AdapterNorm,
    settings: tuple[str, float | Tensor, float],
    training: bool,
) -> Tensor:
    """Check the arguments of either adapter and run it."""
    activation, scale, dropout_p = settings
    channels = x.shape[-1] if base is None else base.shape[-1]
    check.bottleneck(x, channels, weights, activation, scale)
    if base is not None:
        check.tensor("base_out", base, (*x.shape[:-1], "N"), x)
        check.same_dtype("x", x, base_out=base)
    check.choice("layer_norm", norm.layer_norm, LAYER_NORMS)
    if norm.layer_norm != "none":
        width = x.shape[-1] if norm.layer_norm == "in" else channels
        for name, value in zip(("norm_weight", "norm_bias"), norm[:2]):
            if value is None:
                raise ValueError(f"{name} is needed with layer_norm={norm.layer_norm!r}")
            check.tensor(name, value, (width,), x)
    check.probability("dropout_p", dropout_p)
    dispatch.announce("adapter", x.device)
    if isinstance(scale, Tensor):
        up, scale = fold_scale(scale, *weights[2:]), 1.0
        weights = Bottleneck(*weights[:2], *up)
    transform = Transform(activation, float(scale), float(dropout_p), None)
    return adapter(x, base, weights, norm, transform, training)
