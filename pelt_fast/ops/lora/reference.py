"""The specification of LoRA on a linear layer, in plain PyTorch.

Shapes   x (M, K), weight (N, K), bias (N); lora_a (R, K), lora_b (N, R).
Maths    y = x Wᵀ + b + s S Bᵀ,  S = drop(x) Aᵀ                                  (paper eq. 6)
Saved    x and S. Nothing of size M x N.

Activations may be of lower precision than the factors. The factors are then cast, and their
gradients are accumulated in their own dtype. Gradients that ``needs`` does not request are empty
tensors.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common.bundles import Dropout, FrozenLinear, LowRank, absent
from pelt_fast.ops.common.dropout import dropout
from pelt_fast.ops.common.products import outer


def lora_forward(
    x: Tensor, linear: FrozenLinear, factors: LowRank, drop: Dropout
) -> tuple[Tensor, Tensor]:
    """Return y (M, N) and S (M, R)."""
    lora_a, lora_b, scale = factors
    s = dropout(x, *drop) @ lora_a.to(x.dtype).t()
    y = F.linear(x, *linear) + scale * (s @ lora_b.to(x.dtype).t())
    return y, s


def lora_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    factors: LowRank,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, da, db; ``needs`` holds a flag for each. da reads ``x``, db reads ``s``.

    dS = s dy B;  da = dSᵀ drop(x);  db = s dyᵀ S;  dx = dy W + drop(dS A).
    """
    lora_a, lora_b, scale = factors
    dx, da, db = (absent(dy) for _ in range(3))
    ds = scale * (dy @ lora_b.to(dy.dtype))
    if needs[0]:
        dx = dy @ weight + dropout(ds @ lora_a.to(dy.dtype), *drop)
    if needs[1]:
        da = outer(ds, dropout(x, *drop), lora_a.dtype)
    if needs[2]:
        db = scale * outer(dy, s, lora_b.dtype)
    return dx, da, db
