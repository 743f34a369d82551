"""Facts about a site's modules: head dimension, dtype, and the input of an adapter."""

import torch
from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.layouts.layout import AttentionLayout, FFNLayout
from pelt_fast.layouts.lookup import find
from pelt_fast.modules.projection_view import shape_of

_HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")  # names for D, by model


def head_dim_of(layer: nn.Module, layout: AttentionLayout) -> int:
    """D of an attention of a layer. ValueError where nothing tells it."""
    if layout.heads is not None:
        return layout.heads[1]
    module = find(layer, layout.module)
    for name in _HEAD_DIM:
        if getattr(module, name, None):
            return getattr(module, name)
    raise ValueError(
        f"{layout.module or 'a layer'} ({type(module).__name__}) does not tell the size of a head:"
        f" it has none of {', '.join(_HEAD_DIM)}. Give layout= an AttentionLayout with"
        " heads=(number of key heads, size of one)"
    )


def key_heads_of(layer: nn.Module, layout: AttentionLayout) -> int:
    """Hkv of an attention of a layer."""
    if layout.heads is not None:
        return layout.heads[0]
    return shape_of(find(layer, layout.k))[0] // head_dim_of(layer, layout)


def trained_dtype(config: PeltConfig, *weights: torch.Tensor) -> torch.dtype:
    """The dtype of trainable tensors beside ``weights``: never narrower than one of them."""
    floating = (weight.dtype for weight in weights if weight.is_floating_point())
    dtypes = [getattr(torch, config.dtype), *floating]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def reads_residual(modification: Modification, layout: FFNLayout) -> bool:
    """Whether a parallel adapter reads the residual stream before the block's norm. In a post-norm
    model that stream is the block's own input."""
    reads = layout.adapter_reads if modification.reads == "default" else modification.reads
    return reads == "residual" and layout.norm is not None
