"""A learned scale of an update, folded into its small matrices before the op sees them."""

from torch import Tensor


def fold_scale(
    scale: Tensor, up_weight: Tensor, up_bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Fold a learned scale, scalar () or (1,) or per channel (N), into the small matrices.

    s (H Uᵀ + u) = H (diag(s) U)ᵀ + s u, so the op itself has a fixed scale.
    """
    column = scale.reshape(-1, 1)
    return column * up_weight, None if up_bias is None else scale.reshape(-1) * up_bias


def fold_scale_backward(
    d_up: Tensor, d_up_bias: Tensor | None, scale: Tensor, up_weight: Tensor, up_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`fold_scale` to scale, up_weight, up_bias.

    With G = dyᵀ H the gradient of the folded matrix: ds_j = <U_j, G_j> + u_j sum dy_j, summed over
    j for a scalar. Exact for any s, also 0. Nothing of size M x N is saved.
    """
    per_channel = (up_weight * d_up).sum(1)
    if up_bias is not None:
        per_channel = per_channel + up_bias * d_up_bias
    ds = (per_channel if scale.numel() > 1 else per_channel.sum()).reshape(scale.shape)
    d_bias = None if up_bias is None else scale.reshape(-1) * d_up_bias
    return ds, scale.reshape(-1, 1) * d_up, d_bias
