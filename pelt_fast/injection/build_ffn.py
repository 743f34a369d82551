"""Adapters on feed-forward blocks: beside the block, after it, or after its norm."""

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.layout import FFNLayout
from pelt_fast.layouts.lookup import base_of, find
from pelt_fast.modules import (
    LayerAdapter,
    NormAdapter,
    ParallelFFNAdapter,
    ResidualFFNAdapter,
    SequentialFFNAdapter,
)
from pelt_fast.modules.kept_input import KeptInput
from pelt_fast.modules.projection_view import parameter_of, weight_of

from .dimensions import reads_residual, trained_dtype
from .ffn_block import describe_block, take_block
from .record import Injection, Site
from .shared_weights import Holders, holders_of, is_shared
from .targets import TargetLayer, ffn_layouts

_BEHIND_NORM = ("after_norm", "around_norm")


def build_ffn_adapters(model, modification, stacks, injection) -> None:
    """One adapter for each block. Layers that share a block share its adapter."""
    base, holders, blocks = base_of(model), holders_of(model), set()
    behind_norm = modification.placement in _BEHIND_NORM
    for target, layout in ffn_layouts(base, modification, stacks):
        block = target.layer if behind_norm else find(target.layer, layout.entry)
        if block in blocks:
            continue
        blocks.add(block)
        entry, site = _adapter(base, target, layout, modification, injection)
        injection.changes.add(target.layer, "pelt_ffn_adapter", site)
        injection.changes.call(find(target.layer, entry), site.__call__)
        op = "ffn" if modification.insertion == "parallel" else "adapter"
        name = f"{target.name}.{entry}".removesuffix(".")
        injection.sites.append(Site(name, op, "bottleneck", site))
        if op == "ffn":
            _pack(site, holders, injection)


def _adapter(
    base: nn.Module,
    target: TargetLayer,
    layout: FFNLayout,
    modification: Modification,
    injection: Injection,
) -> tuple[str, nn.Module]:
    """The path of the module whose call the site runs in, and the site."""
    if modification.placement in _BEHIND_NORM:
        ffn = describe_block(base, target.layer, layout)
    else:
        ffn = take_block(base, target, layout, injection)
    weights = (weight_of(find(target.layer, p)) for p in (layout.in_proj, layout.out_proj))
    dtype = trained_dtype(injection.config, *weights)
    if modification.placement == "around_norm" and layout.norm_after is not None:
        norm = find(target.layer, layout.norm_after)
        return layout.norm_after, NormAdapter(norm, ffn, modification, dtype)
    if modification.placement in _BEHIND_NORM:
        return "", LayerAdapter(target.layer, ffn, modification, dtype)
    if modification.insertion == "sequential":
        return layout.entry, SequentialFFNAdapter(ffn, modification, dtype)
    if not reads_residual(modification, layout):
        return layout.entry, ParallelFFNAdapter(ffn, modification, dtype)
    site = ResidualFFNAdapter(ffn, modification, dtype)
    norm = find(target.layer, layout.norm)
    site.kept_input = KeptInput("input" if isinstance(norm, nn.LayerNorm) else "hidden_states")
    hook = norm.register_forward_pre_hook(site.kept_input, with_kwargs=True)
    injection.changes.hook(hook)
    return layout.entry, site


def _pack(site: ParallelFFNAdapter, holders: Holders, injection: Injection) -> None:
    """Move the frozen weights into one buffer with the adapter's (docs/maths.md#i3), if that is
    requested and possible. A weight that two modules hold cannot be in two buffers."""
    frozen = [parameter_of(projection.module) for projection in site.ffn.projections]
    if not injection.pack or any(is_shared(holders, parameter) for parameter in frozen):
        site.leave_unpacked()
    elif site.why_not_fused() is None:
        site.pack()
