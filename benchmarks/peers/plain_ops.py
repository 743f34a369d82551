"""pelt_fast's public functions as plain PyTorch: autograd, torch's dropout, SDPA by concatenation.

``as_plain()`` puts them in the functions' place: an injected model is then the same model, with
the same parameters, as it would be written without this library.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from pelt_fast import functional
from pelt_fast.ops.common.activations import activate


def lora_linear(x, weight, bias, lora_a, lora_b, *, scale, dropout_p=0.0, training=True):
    """PEFT's expression, factors in the activation's dtype."""
    s = F.linear(F.dropout(x, dropout_p, training), lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + scale * F.linear(s, lora_b.to(x.dtype))


def _update(x, weights, scale, activation, layer_norm, norm, dropout_p, training) -> Tensor:
    down, down_bias, up, up_bias = (None if t is None else t.to(x.dtype) for t in weights)
    norm = tuple(None if t is None else t.to(x.dtype) for t in norm)
    u = F.layer_norm(x, x.shape[-1:], *norm) if layer_norm == "in" else x
    h = F.dropout(activate(activation, F.linear(u, down, down_bias)), dropout_p, training)
    z = scale * F.linear(h, up, up_bias)
    return F.layer_norm(z, z.shape[-1:], *norm) if layer_norm == "out" else z


def parallel_adapter(
    base_out, x, *weights, scale=1.0, activation="relu", layer_norm="none", norm_weight=None,
    norm_bias=None, dropout_p=0.0, training=True,
):  # fmt: skip
    """The module everybody writes."""
    norm = norm_weight, norm_bias
    return base_out + _update(x, weights, scale, activation, layer_norm, norm, dropout_p, training)


def sequential_adapter(h, *weights, **settings):
    """Its input is its residual."""
    return parallel_adapter(h, h, *weights, **settings)


def ffn_parallel_adapter(
    x, in_weight, in_bias, out_weight, out_bias, *weights, adapter_x=None, gate_weight=None,
    gate_bias=None, ffn_activation="gelu", activation="relu", scale=1.0, dropout_p=0.0,
    activation_dropout_p=0.0, output_dropout_p=0.0, packed=None, packed_out=None, packings=None,
    training=True,
):  # fmt: skip
    """The block and the module beside it."""
    inner = F.linear(x, in_weight, in_bias)
    if gate_weight is None:
        inner = activate(ffn_activation, inner)
    else:
        inner = activate(ffn_activation, F.linear(x, gate_weight, gate_bias)) * inner
    y = F.linear(F.dropout(inner, activation_dropout_p, training), out_weight, out_bias)
    read, none = x if adapter_x is None else adapter_x, (None, None)
    update = _update(read, weights, scale, activation, "none", none, dropout_p, training)
    return F.dropout(y, output_dropout_p, training) + update


def prefix_attention(
    q, k, v, prefix_k, prefix_v, *, attn_mask=None, is_causal=False, scale=None, form="softmax",
    composition="gated", dropout_p=0.0, training=True,
):  # fmt: skip
    """[prefix; context] copied together under a mask; an ungated form as an addition."""
    p = dropout_p if training else 0.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeats, (queries, keys) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2])
    prefix_k, prefix_v = (
        t.to(q.dtype).expand(q.shape[0], -1, -1, -1).repeat_interleave(repeats, 1)
        for t in (prefix_k, prefix_v)
    )
    k, v = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (k, v))
    if is_causal:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        attn_mask = ones.tril(keys - queries)
    elif attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)  # of another dtype torch's kernel may misread it
    if composition == "add":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, p, scale=scale)
        scores = scale * q @ prefix_k.transpose(-1, -2)
        weights = torch.softmax(scores, -1) if form == "softmax" else F.relu(scores)
        return out + F.dropout(weights, p) @ prefix_v
    mask = attn_mask
    if mask is not None:
        seen = True if mask.dtype == torch.bool else 0.0
        mask = F.pad(mask, (prefix_k.shape[2], 0), value=seen)
    k, v = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
    return F.scaled_dot_product_attention(q, k, v, mask, p, scale=scale)


FUNCTIONS = (lora_linear, parallel_adapter, sequential_adapter, ffn_parallel_adapter,
             prefix_attention)  # fmt: skip


@contextlib.contextmanager
def as_plain() -> Iterator[None]:
    """Inside, the functions are plain PyTorch."""
    with contextlib.ExitStack() as stack:
        for function in FUNCTIONS:
            stack.enter_context(mock.patch.object(functional, function.__name__, function))
        yield
