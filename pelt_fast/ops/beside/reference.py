"""The specification of a low-rank update beside a frozen layer, in plain PyTorch.

The layer computes its own product, because only it can read its weight. The update is in two
halves: the first runs before the layer, the second on the layer's output.

Shapes   x (M, K); down_weight (R, K); t (M, R); base (M, N), the layer's output; up_weight (N, R);
         pre, gate (M, F): the outputs of the projections inside a feed-forward block.
Maths    T = drop_x(x) Dᵀ + d;  H = drop(f(T));  y = drop_o(base) + s (H Uᵀ + u)
         LoRA (paper eq. 6): f is the identity, without biases; its one dropout is drop_x.
         An FFN adapter (section 3.3): its dropout is drop; drop_o is the model's own.
         A = drop_a(φ(Z)) or drop_a(φ(G) Z), the activation between two frozen layers
Saved    x and T; Z (and G). Nothing of size M x N.

Activations may be of lower precision than the small matrices. The matrices are then cast, and their
gradients are accumulated in their own dtype. Gradients that ``needs`` does not request are empty
tensors.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from pelt_fast.ops.common.activations import activate, derivative
from pelt_fast.ops.common.bundles import Down, Dropout, Transform, Up, absent
from pelt_fast.ops.common.dropout import dropout
from pelt_fast.ops.common.products import outer


def _cast(like: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(like.dtype), None if bias is None else bias.to(like.dtype)


def down_forward(x: Tensor, down: Down, drop: Dropout) -> Tensor:
    """Return T (M, R)."""
    return F.linear(dropout(x, *drop), *_cast(x, *down))


def down_backward(
    dt: Tensor,
    x: Tensor,
    base: Tensor | None,
    down_weight: Tensor,
    drop: Dropout,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx and the gradients of down_weight and down_bias; ``needs`` holds a flag for each.

    ``base`` is the gradient of x through the frozen layer, or None. Only dD reads ``x``.

    dx = base + drop_x(dT D);  dD = dTᵀ drop_x(x);  dd = Σ dT.
    """
    grads = [absent(dt) for _ in range(3)]
    if needs[0]:
        update = dropout(dt @ down_weight.to(dt.dtype), *drop)
        grads[0] = update if base is None else base + update
    if needs[1]:
        grads[1] = outer(dt, dropout(x, *drop), down_weight.dtype)
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
    """Return y (M, N)."""
    activation, scale, *drop = transform
    h = dropout(activate(activation, t), *drop)
    update = scale * F.linear(h, *_cast(h, *up))
    return dropout(base, output_dropout_p, output_seed) + update


def up_backward(
    dy: Tensor,
    t: Tensor,
    up_weight: Tensor,
    transform: Transform,
    output_dropout_p: float,
    output_seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d_base, dT and the gradients of up_weight and up_bias; ``needs`` holds a flag for
    each. d_base is requested only with an output dropout: without one it is dy itself.

    d_base = drop_o(dy);  dT = s drop(dy U) f'(T);  dU = s dyᵀ H;  du = s Σ dy.
    T is read for dU, and for dT if f is not the identity.
    """
    activation, scale, *drop = transform
    grads = [absent(dy) for _ in range(4)]
    if needs[0]:
        grads[0] = dropout(dy, output_dropout_p, output_seed)
    if needs[1]:
        dt = dropout(scale * (dy @ up_weight.to(dy.dtype)), *drop)
        grads[1] = dt if activation == "identity" else dt * derivative(activation, t)
    if needs[2]:
        grads[2] = scale * outer(dy, dropout(activate(activation, t), *drop), up_weight.dtype)
    if needs[3]:
        grads[3] = scale * dy.sum(0, dtype=up_weight.dtype)
    return tuple(grads)


def activation_forward(pre: Tensor, gate: Tensor | None, activation: str, drop: Dropout) -> Tensor:
    """Return A (M, F), of Z alone or of Z and its gate."""
    a = activate(activation, pre) if gate is None else activate(activation, gate) * pre
    return dropout(a, *drop)


def activation_backward(
    da: Tensor, pre: Tensor, gate: Tensor | None, activation: str, drop: Dropout
) -> tuple[Tensor, Tensor]:
    """Return dZ and dG (an empty tensor without a gate).

    dZ = drop_a(dA) φ'(Z), or dZ = drop_a(dA) φ(G) and dG = drop_a(dA) Z φ'(G).
    """
    da = dropout(da, *drop)
    if gate is None:
        return da * derivative(activation, pre), absent(da)
    return da * activate(activation, gate), da * pre * derivative(activation, gate)
