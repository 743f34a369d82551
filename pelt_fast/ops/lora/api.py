"""The public function of LoRA: arguments are checked, then the op runs."""

from torch import Tensor

from pelt_fast.ops.common import arguments as check
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.bundles import FrozenLinear, LowRank

from .op import lora


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``x weightᵀ + bias + scale * dropout(x) lora_aᵀ lora_bᵀ`` (paper equation 6).

    Dropout acts on the input of the branch, as in LoRA and PEFT.

    Args:
        x: the layer's input (..., K).
        weight: the frozen weight (N, K), of x's dtype. It gets a gradient if it requires one.
        bias: the frozen bias (N), or None.
        lora_a: A (R, K), of x's dtype or wider.
        lora_b: B (N, R), of x's dtype or wider.
        scale: s, which multiplies the update (alpha / R in PEFT).
        dropout_p: the probability, in [0, 1).
        training: whether the dropout acts.

    Returns:
        The layer's output (..., N).

    Raises:
        TypeError: an argument is no tensor, or of another dtype; the message names it.
        ValueError: an argument has another shape, device or value; the message names it.

    Saved:
        For backward: x and M x R elements, M the product of x's leading dims, with and without
        dropout.

    Example:
        >>> x, weight = torch.randn(2, 5, 16), torch.randn(8, 16)
        >>> lora_a, lora_b = torch.randn(4, 16), torch.zeros(8, 4)
        >>> lora_linear(x, weight, None, lora_a, lora_b, scale=2.0).shape
        torch.Size([2, 5, 8])
    """
    check.activation_tensor("x", x, 1)
    x, weight, bias = check.cast(x, weight, bias)
    inputs = x.shape[-1]
    check.tensor("weight", weight, ("N", inputs), x)
    outputs = weight.shape[0]
    check.tensor("bias", bias, (outputs,), x, optional=True)
    check.tensor("lora_a", lora_a, ("R", inputs), x)
    check.tensor("lora_b", lora_b, (outputs, lora_a.shape[0]), x)
    check.same_dtype("x", x, weight=weight, bias=bias)
    check.trainable_dtype(x, lora_a=lora_a, lora_b=lora_b)
    check.update_scale(scale, 1)
    check.probability("dropout_p", dropout_p)
    dispatch.announce("lora", x.device)
    factors = LowRank(lora_a, lora_b, float(scale))
    return lora(x, FrozenLinear(weight, bias), factors, float(dropout_p), training)
