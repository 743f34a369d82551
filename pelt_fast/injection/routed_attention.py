"""Attention where each row of the batch has the prefix of its own method."""

import torch
from torch import Tensor, nn

from pelt_fast import functional
from pelt_fast.modules.prefix_run import AttentionSlice
from pelt_fast.modules.routed_slice import RoutedSlice
from pelt_fast.ops.common.bundles import QKV


def attend_together(
    module: nn.Module,
    site: RoutedSlice,
    qkv: QKV,
    *,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """The heads (B, H, T, D). Methods of one form and composition run in one op for the whole
    batch; those of another one then run on their own rows."""
    given = dict(is_causal=causal, scale=scaling, dropout_p=dropout, training=module.training)
    routes = site.routes.of(qkv.q.shape[0], qkv.q.device)
    first, *others = site.by_form().items()
    out = _of_one_form(site, *first, qkv, routes, attn_mask=mask, **given)
    for form, slices in others:
        rows = torch.isin(routes, routes.new_tensor(list(slices))).nonzero()[:, 0]
        if rows.numel():
            part = QKV(*(tensor[rows] for tensor in qkv))
            own_mask = mask[rows] if mask is not None and len(mask) == len(routes) else mask
            heads = _of_one_form(
                site, form, slices, part, routes[rows], attn_mask=own_mask, **given
            )
            out = out.index_copy(0, rows, heads)
    return out


def _of_one_form(
    site: RoutedSlice,
    form: tuple[str, str],
    slices: dict[int, AttentionSlice],
    qkv: QKV,
    routes: Tensor,
    **given,
) -> Tensor:
    scaling = qkv.q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    keys, values = site.stacked(slices, scaling, qkv.q)
    return functional.routed_prefix_attention(
        *qkv, routes, keys, values, form=form[0], composition=form[1], **given
    )
