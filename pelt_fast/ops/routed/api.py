"""The public function of many methods in one batch: arguments are checked, then the ops run."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pelt_fast.ops.common import arguments as check
from pelt_fast.ops.common import dispatch
from pelt_fast.ops.common.activations import ACTIVATIONS
from pelt_fast.ops.common.arguments import Layer
from pelt_fast.ops.common.bundles import RoutedDown, RoutedDropout, RoutedTransform, RoutedUp
from pelt_fast.ops.common.dropout import draw_seeds

from . import op
from .segments import segments_of

Factors = Sequence[Tensor | None]


class _Given(NamedTuple):
    """The factors as the caller gave them, an item for each method."""

    down_weights: Factors
    up_weights: Factors
    down_biases: Factors
    up_biases: Factors


def routed_beside(
    x: Tensor,
    layer: Layer | Tensor,
    routes: Tensor,
    down_weights: Factors,
    up_weights: Factors,
    *,
    down_biases: Factors | None = None,
    up_biases: Factors | None = None,
    scales: Sequence[float],
    activation: str = "identity",
    input_dropout_p: float | Sequence[float] = 0.0,
    dropout_p: float | Sequence[float] = 0.0,
    training: bool = True,
) -> Tensor:
    """Low-rank updates of many methods in one batch: each row of the batch has its own method.

    A row r of method g gets ``layer(x)[r] + s_g (drop(f(drop(x[r]) D_gᵀ + d_g)) U_gᵀ + u_g)``, a
    row of none ``layer(x)[r]``. Each method's rows get what :func:`lora_beside` or
    :func:`parallel_adapter` would give them alone. No rank is padded to another's, and no weight is
    copied for each row.

    Args:
        x: the layer's input (kB, ..., K): k consecutive entries belong to a row of the batch.
        layer: the frozen layer, a function of x that returns (kB, ..., N); or what it returned.
        routes: the method of each row of the batch (B) int64, -1 for none.
        down_weights: D_g (R_g, K) of each method; None for a method that has nothing here.
        up_weights: U_g (N, R_g) of each method, of the dtype of the layer's output or wider.
        down_biases: d_g (R_g) or None of each method.
        up_biases: u_g (N) or None of each method.
        scales: s_g of each method (alpha / R in PEFT).
        activation: f of every method: "identity" (LoRA), "relu", "gelu", "gelu_tanh", "silu" or
            "tanh".
        input_dropout_p: the probability of the dropout on x, in [0, 1): a number, or one for each
            method.
        dropout_p: the one of the bottleneck, after f.
        training: whether the dropouts act.

    Returns:
        The layer's output with the updates added (kB, ..., N), in the dtype of the layer's output.

    Raises:
        TypeError: an argument is no tensor, no function, or of another dtype; the message names it.
        ValueError: an argument or the layer's output has another shape, device or value; the
            message names it.

    Saved:
        For backward: x and M x R elements, M the product of x's leading dims, R the largest rank;
        the factors of all methods once, stacked; 32 bytes for each segment of the batch; and what
        the layer itself saves.

    Example:
        >>> x, layer = torch.randn(3, 5, 16), torch.nn.Linear(16, 8).requires_grad_(False)
        >>> downs = [torch.randn(4, 16), torch.randn(2, 16)]
        >>> ups = [torch.zeros(8, 4), torch.zeros(8, 2)]
        >>> routes = torch.tensor([1, -1, 0])
        >>> routed_beside(x, layer, routes, downs, ups, scales=[2.0, 1.0]).shape
        torch.Size([3, 5, 8])
    """
    check.activation_tensor("x", x, 2)
    count = len(scales)
    _check_routes(routes, x, count)
    none = [None] * count
    given = _Given(down_weights, up_weights, down_biases or none, up_biases or none)
    ranks, outputs = _check_factors(x, count, given)
    for i, scale in enumerate(scales):
        if not isinstance(scale, (int, float)) or not abs(scale) < math.inf:
            raise ValueError(f"scales[{i}] must be a finite number, got {scale!r}")
    check.choice("activation", activation, ACTIVATIONS)
    drops = [
        _dropout(name, p, x, count, training)
        for name, p in (("input_dropout_p", input_dropout_p), ("dropout_p", dropout_p))
    ]
    dispatch.announce("routed", x.device)
    layer = _checked(layer, x, outputs, given)
    if not any(ranks):
        return layer if isinstance(layer, Tensor) else layer(x)
    where = segments_of(routes, x.numel() // max(x.shape[-1], 1), ranks)
    down = RoutedDown(_stacked(down_weights), _stacked_biases(given.down_biases, ranks))
    ups = [None if weight is None else weight.reshape(-1) for weight in up_weights]
    biases = _stacked_biases(given.up_biases, [outputs] * count)
    up = RoutedUp(_stacked(ups), None if biases is None else biases.view(count, -1))
    transform = RoutedTransform(activation, [float(s) for s in scales])
    return op.routed_update(x, layer, down, up, where, transform, *drops)


def _check_routes(routes: Tensor, x: Tensor, count: int) -> None:
    check.tensor("routes", routes, ("B",), x)
    if routes.dtype != torch.int64:
        raise TypeError(f"routes must be torch.int64, got {routes.dtype}")
    batch = routes.shape[0]
    if (x.shape[0] % batch if batch else x.shape[0]) != 0:
        raise ValueError(
            f"routes must have a length that divides x's first dim, {x.shape[0]}, got {batch}"
        )
    # on a GPU a look at them would wait for it
    if routes.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(routes))
        if low < -1 or high >= count:
            raise ValueError(
                f"routes must be -1 to {count - 1}, the methods of scales,"
                f" got {low if low < -1 else high}"
            )


def _check_factors(x: Tensor, count: int, given: _Given) -> tuple[list[int], int | str]:
    """Check the factors of all methods; return their ranks and N."""
    for name, items in given._asdict().items():
        if len(items) != count:
            raise ValueError(f"{name} must have {count} items as scales has, got {len(items)}")
    ranks: list[int] = []
    outputs: int | str = "N"
    methods: Iterable[Any] = zip(*given, strict=True)
    for i, (down, up, down_bias, up_bias) in enumerate(methods):
        if all(one is None for one in (down, up, down_bias, up_bias)):
            ranks.append(0)
            continue
        check.tensor(f"down_weights[{i}]", down, ("R", x.shape[-1]), x)
        check.tensor(f"up_weights[{i}]", up, (outputs, down.shape[0]), x)
        outputs = up.shape[0]
        for name, weight, bias in (("down", down, down_bias), ("up", up, up_bias)):
            check.tensor(f"{name}_biases[{i}]", bias, (weight.shape[0],), x, optional=True)
            check.same_dtype(f"{name}_weights[{i}]", weight, **{f"{name}_biases[{i}]": bias})
        ranks.append(down.shape[0])
    return ranks, outputs


def _dropout(
    name: str, p: float | Sequence[float], x: Tensor, count: int, training: bool
) -> RoutedDropout:
    """The dropout of all methods, its seeds drawn."""
    each = [p] * count if isinstance(p, (int, float)) else list(p)
    if len(each) != count:
        raise ValueError(
            f"{name} must be a number or one for each of scales, {count}, got {len(each)}"
        )
    for value in each:
        check.probability(name, value)
    seeds = draw_seeds(x, training, *each)
    return RoutedDropout([] if seeds is None else [float(value) for value in each], seeds)


def _checked(layer: Layer | Tensor, x: Tensor, outputs: int | str, given: _Given) -> Layer | Tensor:
    """The layer, whose output is checked; its output itself is checked here."""
    second = dict(up_weights=given.up_weights, up_biases=given.up_biases)
    named = {f"{name}[{i}]": one for name, items in second.items() for i, one in enumerate(items)}
    if isinstance(layer, Tensor):
        check.layer_output("layer", layer, x, outputs, **named)
        return layer
    check.function("layer", layer)
    return check.checked_layer("layer", layer, x, outputs, **named)


def _stacked(factors: Factors) -> Tensor:
    """The factors of all methods, one behind the other."""
    present = [factor for factor in factors if factor is not None]
    return present[0] if len(present) == 1 else torch.cat(present)


def _stacked_biases(biases: Factors, sizes: Sequence[Any]) -> Tensor | None:
    """The biases of all methods, one behind the other, zeros for a missing one; None if all are
    missing."""
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    return torch.cat([
        like.new_zeros(size) if bias is None else bias
        for bias, size in zip(biases, sizes, strict=True)
    ])  # fmt: skip
