"""The values that a folded site gives the base's parameters (formulas in ``merge``)."""

import torch
from torch import Tensor, nn

from pelt_fast.injection.record import Site
from pelt_fast.modules import LoRALinear, ParallelFFNAdapter, SequentialAdapter

Written = tuple[nn.Module, str, Tensor]  # linear layer, parameter name, its new value


def folded_values(site: Site) -> list[Written]:
    """What folding a site writes."""
    module = site.module
    if isinstance(module, LoRALinear):
        return _lora(module)
    if isinstance(module, SequentialAdapter):
        return _linear_adapter(module)
    return _widened_block(module)


def _lora(module: LoRALinear) -> list[Written]:
    """W + s B A (N, K)."""
    linear = module.frozen.module
    update = module.scale * _wide(module.lora_b) @ _wide(module.lora_a)
    return [(linear, "weight", _rounded(_wide(linear.weight) + update, linear.weight))]


def _linear_adapter(module: SequentialAdapter) -> list[Written]:
    """W + s U D W and b + s (U (D b + d) + u); without residual, the updates alone."""
    linear = module.frozen.module
    down, d, up, u = map(_wide, module.weights)
    scale = _column(module.scale)
    up, u = up * scale, (u.view(-1, 1) * scale).view(-1)
    weight = _wide(linear.weight)
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else _wide(linear.bias)
    keep = 1.0 if module.residual else 0.0
    return [
        (linear, "weight", _rounded(keep * weight + up @ (down @ weight), linear.weight)),
        (linear, "bias", _rounded(keep * bias + up @ (down @ bias + d) + u, linear.weight)),
    ]


def _widened_block(module: ParallelFFNAdapter) -> list[Written]:
    """[W1; D] (F + R, K) and [W2 | s U] (N, F + R), with their biases."""
    module.unpack()
    scale = _column(module.scale)
    first, last = module.ffn.in_proj.module, module.ffn.out_proj.module
    up = _rounded(_wide(module.up_weight) * scale, last.weight)
    down_bias, up_bias = module.down_bias, _wide(module.up_bias).view(-1, 1) * scale
    out_bias = up_bias.view(-1) if last.bias is None else _wide(last.bias) + up_bias.view(-1)
    in_bias = first.weight.new_zeros(first.weight.shape[0]) if first.bias is None else first.bias
    down = module.down_weight.to(first.weight.dtype)
    return [
        (first, "weight", torch.cat([first.weight, down])),
        (first, "bias", torch.cat([in_bias, down_bias.to(in_bias.dtype)])),
        (last, "weight", torch.cat([last.weight, up], 1)),
        (last, "bias", _rounded(out_bias, last.weight)),
    ]


def _column(scale: float | Tensor) -> float | Tensor:
    """A scale that multiplies rows: a number, or learned, scalar or per channel."""
    return scale.detach().reshape(-1, 1) if isinstance(scale, Tensor) else scale


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _rounded(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype)
