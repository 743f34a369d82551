"""The public functions: validate once, draw the dropout seed, call the op's Function.

Activations may have any leading dims; below, M is their product. Trainable weights may be fp32
beside bf16 or fp16 activations: they are cast, never the activation, and their gradients come
back in fp32. Frozen weights have the activation's dtype. Under autocast the activations and frozen
weights of a layer follow it, as ``F.linear``'s do; inside an op it is off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pelt_fast import checks
from pelt_fast.ops import support
from pelt_fast.ops.ffn import WidenedFFNFunction
from pelt_fast.ops.function import run
from pelt_fast.ops.heads import PrefixAttentionFunction
from pelt_fast.ops.library import autocasts
from pelt_fast.ops.low_rank import AdapterFunction, LoRALinearFunction
from pelt_fast.reference.activations import ACTIVATIONS
from pelt_fast.reference.low_rank import fold_scale
from pelt_fast.reference.philox import draw_seed, threshold

if TYPE_CHECKING:
    from pelt_fast.modules.packing import Packings

LAYER_NORMS = ("none", "in", "out")


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What ``F.linear`` would do to its arguments under ``torch.autocast``."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _seed(x: Tensor, training: bool, *probabilities: float) -> Tensor | None:
    """A seed for each dropout of the op, or None when none of them acts."""
    if not training or all(threshold(p) == 0 for p in probabilities):
        return None
    return draw_seed(x.device, len(probabilities))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


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

    x (..., K), weight (N, K), bias (N) or None, lora_a (R, K), lora_b (N, R); returns (..., N).
    Dropout acts on the branch's input, as in LoRA and PEFT. Saved for backward: x and M x R
    elements, with and without dropout. Raises TypeError / ValueError that name the argument.
    """
    checks.activation_tensor("x", x, 1)
    x, weight, bias = _autocast(x, weight, bias)
    inputs = x.shape[-1]
    checks.tensor("weight", weight, ("N", inputs), x)
    outputs = weight.shape[0]
    checks.tensor("bias", bias, (outputs,), x, optional=True)
    checks.tensor("lora_a", lora_a, ("R", inputs), x)
    checks.tensor("lora_b", lora_b, (outputs, lora_a.shape[0]), x)
    checks.same_dtype("x", x, weight=weight, bias=bias)
    checks.trainable_dtype(x, lora_a=lora_a, lora_b=lora_b)
    checks.scale(scale, 1)
    checks.probability("dropout_p", dropout_p)
    support.announce("lora", x.device)
    seed = _seed(x, training, dropout_p)
    y = run(
        LoRALinearFunction,
        _rows(x), weight, bias, lora_a, lora_b, float(scale), float(dropout_p),
        None if seed is None else seed.select(0, 0),
    )  # fmt: skip
    return y.view(*x.shape[:-1], outputs)


def _adapter(
    x: Tensor,
    base: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: float | Tensor,
    activation: str,
    layer_norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dropout_p: float,
    training: bool,
) -> Tensor:
    checks.activation_tensor("h" if base is None else "x", x, 1)
    if base is not None and autocasts(x):
        x = x.to(base.dtype)  # a residual stream stays wide, what a linear returned does not
    channels = x.shape[-1] if base is None else base.shape[-1]
    _check_adapter(x, channels, down_weight, down_bias, up_weight, up_bias, scale, activation)
    if base is not None:
        checks.tensor("base_out", base, (*x.shape[:-1], "N"), x)
        checks.same_dtype("x", x, base_out=base)
    checks.choice("layer_norm", layer_norm, LAYER_NORMS)
    if layer_norm != "none":
        width = x.shape[-1] if layer_norm == "in" else channels
        for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
            if value is None:
                raise ValueError(f"{name} is needed with layer_norm={layer_norm!r}")
            checks.tensor(name, value, (width,), x)
    checks.probability("dropout_p", dropout_p)
    support.announce("adapter", x.device)
    if isinstance(scale, Tensor):
        (up_weight, up_bias), scale = fold_scale(scale, up_weight, up_bias), 1.0
    seed = _seed(x, training, dropout_p)
    y = run(
        AdapterFunction,
        _rows(x), None if base is None else _rows(base), down_weight, down_bias, up_weight,
        up_bias, norm_weight, norm_bias, layer_norm, activation, float(scale), float(dropout_p),
        None if seed is None else seed.select(0, 0),
    )  # fmt: skip
    return y.view(*x.shape[:-1], channels)


def _check_adapter(
    x, channels, down_weight, down_bias, up_weight, up_bias, scale, activation
) -> None:
    checks.tensor("down_weight", down_weight, ("R", x.shape[-1]), x)
    rank = down_weight.shape[0]
    checks.tensor("down_bias", down_bias, (rank,), x, optional=True)
    checks.tensor("up_weight", up_weight, (channels, rank), x)
    checks.tensor("up_bias", up_bias, (channels,), x, optional=True)
    checks.trainable_dtype(
        x, down_weight=down_weight, down_bias=down_bias, up_weight=up_weight, up_bias=up_bias
    )
    checks.same_dtype("down_weight", down_weight, down_bias=down_bias)
    checks.same_dtype("up_weight", up_weight, up_bias=up_bias)
    checks.scale(scale, channels)
    checks.choice("activation", activation, ACTIVATIONS)


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

    x (..., K) is the input of the sub-layer, base_out (..., N) its output; D = down_weight (R, K),
    U = up_weight (N, R), biases (R) and (N) or None. ``scale`` is a number, or a learned scale of
    shape (), (1,) or (N,), whose gradient saves nothing of size M x N. ``layer_norm`` "in"
    normalises x, "out" the scaled update, with norm_weight and norm_bias. Dropout acts on the
    bottleneck. Saved for backward: x and M x R elements.
    """
    checks.activation_tensor("base_out", base_out, 1)
    return _adapter(
        x, base_out, down_weight, down_bias, up_weight, up_bias, scale, activation, layer_norm,
        norm_weight, norm_bias, dropout_p, training,
    )  # fmt: skip


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

    Arguments as in :func:`parallel_adapter`; the one tensor h (..., N) is input and residual, and
    its gradient is made in one accumulation.
    """
    return _adapter(
        h, None, down_weight, down_bias, up_weight, up_bias, scale, activation, layer_norm,
        norm_weight, norm_bias, dropout_p, training,
    )  # fmt: skip


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
    packings: Packings | None = None,
    training: bool = True,
) -> Tensor:
    """A frozen FFN and its parallel adapter as one wider FFN (design note I3).

    ``drop_o(drop_a(φ(x W1ᵀ + b1)) W2ᵀ + b2) + scale * (drop(f(x' Dᵀ + d)) Uᵀ + u)``; with
    ``gate_weight`` the inner part is ``φ(x Wgᵀ + bg) * (x W1ᵀ + b1)``. x' is x, or ``adapter_x``
    where the adapter reads another tensor than the block (the residual stream before a pre-norm).

    x, adapter_x (..., K); in_weight, gate_weight (F, K); out_weight (N, F); down_weight (R, K);
    up_weight (N, R). ``dropout_p`` acts on the bottleneck, the other two are the model's own.
    ``packed`` (F + R or more, K) is [gate_weight; in_weight; down_weight; zeros] stacked: one GEMM
    then reads x once (not with an ``adapter_x``: ValueError). ``packed_out`` (N, F + R or more) is
    [out_weight | scale * up_weight | zeros] side by side: without an output dropout, one GEMM then
    writes y once. Both are saved for backward: they must not change before it. ``packings`` in
    their place are buffers that hold the frozen weights and that each call fills for itself
    (:class:`pelt_fast.modules.packing.Packings`). The frozen weights get no gradient: an error says
    so if one wants it.
    Saved for backward: x' and the pre-activations (M, F + R).
    """
    checks.activation_tensor("x", x, 1)
    x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias, *others = _autocast(
        x, in_weight, in_bias, gate_weight, gate_bias, out_weight, out_bias, adapter_x, packed,
        packed_out,
    )  # fmt: skip
    adapter_x, packed, packed_out = others
    inputs = x.shape[-1]
    checks.tensor("in_weight", in_weight, ("F", inputs), x)
    inner = in_weight.shape[0]
    checks.tensor("in_bias", in_bias, (inner,), x, optional=True)
    checks.tensor("gate_weight", gate_weight, (inner, inputs), x, optional=True)
    checks.tensor("gate_bias", gate_bias, (inner,), x, optional=True)
    checks.tensor("out_weight", out_weight, ("N", inner), x)
    checks.tensor("out_bias", out_bias, (out_weight.shape[0],), x, optional=True)
    base = dict(
        in_weight=in_weight, in_bias=in_bias, gate_weight=gate_weight, gate_bias=gate_bias,
        out_weight=out_weight, out_bias=out_bias,
    )  # fmt: skip
    checks.tensor("adapter_x", adapter_x, x.shape, x, optional=True)
    checks.same_dtype("x", x, adapter_x=adapter_x, **base, packed=packed, packed_out=packed_out)
    checks.frozen(**base)
    channels = out_weight.shape[0]
    _check_adapter(x, channels, down_weight, down_bias, up_weight, up_bias, scale, activation)
    rows = inner * (1 if gate_weight is None else 2) + down_weight.shape[0]
    checks.tensor("packed", packed, ("rows", inputs), x, optional=True)
    if packed is not None and adapter_x is not None:
        raise ValueError("packed is the weights of one input, got an adapter_x beside x: leave one")
    if packed is not None and packed.shape[0] < rows:
        raise ValueError(f"packed must have at least {rows} rows, got {packed.shape[0]}")
    columns = inner + down_weight.shape[0]
    checks.tensor("packed_out", packed_out, (channels, "columns"), x, optional=True)
    if packed_out is not None and packed_out.shape[1] < columns:
        raise ValueError(
            f"packed_out must have at least {columns} columns, got {packed_out.shape[1]}"
        )
    checks.choice("ffn_activation", ffn_activation, ACTIVATIONS)
    probabilities = (dropout_p, activation_dropout_p, output_dropout_p)
    for name, p in zip(("dropout_p", "activation_dropout_p", "output_dropout_p"), probabilities):
        checks.probability(name, p)
    support.announce("ffn", x.device)
    if isinstance(scale, Tensor):
        (up_weight, up_bias), scale = fold_scale(scale, up_weight, up_bias), 1.0
    seed = _seed(x, training, *probabilities)
    if seed is None:
        probabilities = (0.0, 0.0, 0.0)
    y = run(
        WidenedFFNFunction,
        _rows(x), None if adapter_x is None else _rows(adapter_x), in_weight, in_bias, gate_weight,
        gate_bias, out_weight, out_bias, down_weight, down_bias, up_weight, up_bias, packed,
        packed_out, packings, ffn_activation, activation, float(scale),
        *map(float, probabilities), seed,
    )  # fmt: skip
    return y.view(*x.shape[:-1], channels)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    form: str = "softmax",
    composition: str = "gated",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Attention over ``[prefix; context]`` without concatenating them (paper equation 7).

    q (B, H, T, D); k, v (B, Hkv, S, D) with H a multiple of Hkv; prefix_k, prefix_v (Hkv, P, D),
    seen by every query. ``attn_mask`` covers the context alone: (T, S) or broadcastable to
    (B, H, T, S), bool (True is visible) or additive. Causal is bottom-right aligned. ``scale``
    defaults to D ** -0.5. ``composition="gated"`` is prefix tuning, (1 - λ) h + λ Δh;
    ``"add"`` is h + Δh, with ``form`` "softmax" or "relu" (multi-head adapter).
    Returns (B, H, T, D), laid out in memory as (B, T, H, D).
    """
    checks.activation_tensor("q", q, 4)
    q, k, v = _autocast(q, k, v)
    batch, heads, queries, dim = q.shape
    checks.tensor("k", k, (batch, "Hkv", "S", dim), q)
    kv_heads, keys = k.shape[1:3]
    checks.tensor("v", v, (batch, kv_heads, keys, dim), q)
    checks.tensor("prefix_k", prefix_k, (kv_heads, "P", dim), q)
    checks.tensor("prefix_v", prefix_v, tuple(prefix_k.shape), q)
    checks.same_dtype("q", q, k=k, v=v)
    checks.trainable_dtype(q, prefix_k=prefix_k, prefix_v=prefix_v)
    if heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads, which does not divide q's {heads}")
    if prefix_k.shape[1] < 1:
        raise ValueError("prefix_k must hold at least one key (P >= 1), got P = 0")
    _check_mask(attn_mask, (batch, heads, queries, keys), q)
    checks.choice("form", form, ("softmax", "relu"))
    checks.choice("composition", composition, ("gated", "add"))
    if form == "relu" and composition == "gated":
        raise ValueError("form='relu' has no gate: use composition='add'")
    checks.probability("dropout_p", dropout_p)
    if scale is None:
        scale = dim**-0.5
    else:
        checks.scale(scale, 1)
        scale = float(scale)
    support.announce("prefix", q.device)
    seed = _seed(q, training, dropout_p, dropout_p)
    return run(
        PrefixAttentionFunction,
        q, k, v, prefix_k, prefix_v, attn_mask, bool(is_causal), scale, form, composition,
        0.0 if seed is None else float(dropout_p), seed,
    )  # fmt: skip


def _check_mask(mask: Tensor | None, shape: tuple[int, ...], like: Tensor) -> None:
    if mask is None:
        return
    checks.tensor("attn_mask", mask, tuple(mask.shape), like)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError("attn_mask requires a gradient, which prefix_attention does not compute")
    fits = mask.dim() in (2, 4) and all(
        have in (1, want) for have, want in zip(mask.shape, shape[-mask.dim() :])
    )
    if not fits:
        raise ValueError(
            f"attn_mask must be {shape[-2:]} or broadcast to {shape} (the prefix is not masked),"
            f" got {tuple(mask.shape)}"
        )
