"""How each form gets into a model: its sites are made, registered, and called."""

import torch
from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.layouts.layout import FFNLayout
from pelt_fast.layouts.lookup import base_of, find
from pelt_fast.layouts.names import compiled_from
from pelt_fast.modules import (
    LayerAdapter,
    LoRALinear,
    MultiHeadAdapter,
    NormAdapter,
    ParallelAttentionAdapter,
    ParallelFFNAdapter,
    PrefixBank,
    PrefixSlice,
    Prompt,
    QueryHeads,
    QuerySlice,
    ResidualFFNAdapter,
    SequentialAdapter,
    SequentialFFNAdapter,
)
from pelt_fast.modules.frozen_module import FrozenModule
from pelt_fast.modules.joined_projection import JoinedProjection
from pelt_fast.modules.kept_input import KeptInput
from pelt_fast.modules.projection_view import (
    JOINED,
    LORA,
    ProjectionView,
    device_of,
    host_of,
    parameter_of,
    shape_of,
    weight_of,
)

from . import attention_interface as attention
from .ffn_block import describe_block, take_block
from .generate import take_generate
from .prompt import attach_prompt
from .record import Injection, Site
from .shared_weights import holders_of, is_shared
from .targets import attention_layouts, ffns, linears, prompted


def _dtype(config: PeltConfig, *weights: torch.Tensor) -> torch.dtype:
    """The trainable tensors' dtype beside ``weights``: never narrower than one of them."""
    floating = (weight.dtype for weight in weights if weight.is_floating_point())
    dtypes = [getattr(torch, config.dtype), *floating]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _inject_lora(model, modification, config, stacks, injection) -> None:
    for name, linear in linears(base_of(model), modification, stacks):
        if LORA in host_of(linear)._modules:
            continue  # another target's, of the same layer: tied q and k
        fused = isinstance(linear, ProjectionView) and linear.rows is not None
        linear = _held(linear, injection) if fused else linear
        site = LoRALinear(linear, modification.size, modification.scale, modification.dropout,
                          modification.init, _dtype(config, weight_of(linear)))  # fmt: skip
        injection.changes.add(host_of(linear), LORA, site)
        if not fused:  # else what holds the part runs
            injection.changes.call(host_of(linear), site.__call__)
        injection.sites.append(Site(name, "lora", "low_rank", site))


def _held(part: ProjectionView, injection: Injection) -> ProjectionView:
    """The part, held by what runs in the place of its owner."""
    if JOINED not in part.owner._modules:
        fused = JoinedProjection(part.owner)
        injection.changes.add(part.owner, JOINED, fused)
        injection.changes.call(part.owner, fused.__call__)
    fused = part.owner._modules[JOINED]
    return fused._modules.get(part.name) or fused.part(part)


def _inject_prefix(model, modification, config, stacks, injection) -> None:
    base = base_of(model)
    banks: dict[tuple[str, str], PrefixBank] = {}
    for place, layout in attention_layouts(base, modification, stacks):
        module = find(place.layer, layout.module)
        key = place.stack.layers, layout.kind
        if key not in banks:
            owner = find(base, place.stack.owner)
            layers = find(base, place.stack.layers)
            # the layers it serves, each once, in order
            served = {compiled_from(layers[i]) for i in modification.layers or range(len(layers))}
            bank = banks[key] = _bank(place, layout, module, modification, config, len(served))
            injection.changes.add(
                owner, _free_name(owner, _bank_name(layout.kind, modification)), bank
            )
            injection.changes.hook(owner.register_forward_pre_hook(attention.still_wrapped))
            injection.changes.hook(owner.register_forward_pre_hook(bank.before_stack))
            injection.changes.hook(owner.register_forward_hook(bank.after_stack))
        bank = banks[key]
        injection.changes.set(
            module, attention.SLICE, PrefixSlice(bank, place.order, modification.composition)
        )
        queries = shape_of(find(place.layer, layout.q))[0]
        injection.sites.append(Site(f"{place.name}.{layout.module}", "prefix", "prefix", bank,
                                   attention=module, queries=queries))  # fmt: skip
        attention.wrap(module, injection)
    take_generate(model, injection)


def _bank_name(kind: str, modification: Modification) -> str:
    """What a bank is registered as: prefixes on other layers of the same kind have names of their
    own."""
    first = "" if modification.layers is None else f"_{modification.layers[0]}"
    return f"pelt_{kind}_prefix{first}"


def _free_name(owner: nn.Module, name: str) -> str:
    """A child's name, numbered where stacks of one owner would share it."""
    free, number = name, 2
    while free in owner._modules:
        free, number = f"{name}_{number}", number + 1
    return free


def head_dim_of(module: nn.Module) -> int:
    """D of an attention module."""
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    return next(getattr(module, name) for name in names if getattr(module, name, None))


def reads_residual(modification: Modification, layout: FFNLayout) -> bool:
    """Whether a parallel adapter reads the stream before the block's norm. In a post-norm model
    that stream is the block's own input: there is nothing else to read."""
    reads = layout.adapter_reads if modification.reads == "default" else modification.reads
    return reads == "residual" and layout.norm is not None


def _bank(place, layout, module, modification, config, layers: int) -> PrefixBank:
    key, head_dim = find(place.layer, layout.k), head_dim_of(module)
    out_features, width = shape_of(key)
    return PrefixBank(layers, out_features // head_dim, head_dim, width, modification,
                      device_of(key), _dtype(config, weight_of(key)))  # fmt: skip


def _inject_bottleneck(model, modification, config, stacks, injection) -> None:
    if modification.target == "ffn":
        _inject_ffn(model, modification, config, stacks, injection)
    elif modification.reads == "query":
        _inject_query_heads(model, modification, config, stacks, injection)
    else:
        _inject_at_output(model, modification, config, stacks, injection)


def _inject_at_output(model, modification, config, stacks, injection) -> None:
    """Adapters that run where an attention's output projection is called."""
    made: dict[nn.Module, nn.Module] = {}  # by projection: one of two attentions has one adapter
    for place, layout in attention_layouts(base_of(model), modification, stacks):
        linear, module = find(place.layer, layout.out), find(place.layer, layout.module)
        host = host_of(linear)
        if host in made:
            if modification.insertion == "parallel":
                kept_input = made[host].kept_input
                injection.changes.hook(
                    module.register_forward_pre_hook(kept_input, with_kwargs=True)
                )
            continue
        dtype = _dtype(config, weight_of(linear))
        if modification.insertion == "sequential":
            site = SequentialAdapter(linear, modification, dtype)
        elif modification.target == "heads":
            heads = shape_of(linear)[1] // head_dim_of(module)
            site = MultiHeadAdapter(linear, heads, modification, dtype)
        else:
            width = shape_of(find(place.layer, layout.q))[1]
            site = ParallelAttentionAdapter(linear, width, modification, dtype)
        if modification.insertion == "parallel":
            injection.changes.hook(
                module.register_forward_pre_hook(site.kept_input, with_kwargs=True)
            )
        op = "heads" if modification.target == "heads" else "adapter"
        made[host] = site
        injection.changes.add(host, "pelt_heads" if op == "heads" else "pelt_adapter", site)
        injection.changes.call(host, site.__call__)
        injection.sites.append(Site(f"{place.name}.{layout.out}", op, "bottleneck", site))


def _inject_query_heads(model, modification, config, stacks, injection) -> None:
    for place, layout in attention_layouts(base_of(model), modification, stacks):
        module, key = find(place.layer, layout.module), find(place.layer, layout.k)
        head_dim = head_dim_of(module)
        heads, dtype = shape_of(key)[0] // head_dim, _dtype(config, weight_of(key))
        site = QueryHeads(heads, head_dim, modification, device_of(key), dtype)
        site.frozen = FrozenModule(key)
        injection.changes.add(module, "pelt_heads", site)
        injection.changes.set(module, attention.SLICE, QuerySlice(site))
        name = f"{place.name}.{layout.module}"
        queries = shape_of(find(place.layer, layout.q))[0]
        injection.sites.append(
            Site(name, "heads", "bottleneck", site, attention=module, queries=queries)
        )
        attention.wrap(module, injection)
        if place.order == 0:
            owner = find(base_of(model), place.stack.owner)
            injection.changes.hook(owner.register_forward_pre_hook(attention.still_wrapped))


def _inject_ffn(model, modification, config, stacks, injection) -> None:
    holders, blocks = holders_of(model), set()
    for place, layout in ffns(base_of(model), modification, stacks):
        behind = modification.placement in ("after_norm", "around_norm")
        block = place.layer if behind else find(place.layer, layout.entry)
        if block in blocks:
            continue  # a block that layers share has one adapter
        blocks.add(block)
        base, into, out = base_of(model), layout.in_proj, layout.out_proj
        if behind:
            ffn = describe_block(base, place.layer, layout)
        else:
            ffn = take_block(base, place, layout, injection)
        dtype = _dtype(config, *(weight_of(find(place.layer, path)) for path in (into, out)))
        entry, op = layout.entry, "ffn" if modification.insertion == "parallel" else "adapter"
        if modification.placement == "around_norm" and layout.norm_after is not None:
            entry = layout.norm_after
            site = NormAdapter(find(place.layer, entry), ffn, modification, dtype)
        elif behind:
            site, entry = LayerAdapter(place.layer, ffn, modification, dtype), ""
        elif modification.insertion == "sequential":
            site = SequentialFFNAdapter(ffn, modification, dtype)
        elif reads_residual(modification, layout):
            site = ResidualFFNAdapter(ffn, modification, dtype)
            norm = find(place.layer, layout.norm)
            catch = KeptInput("input" if isinstance(norm, nn.LayerNorm) else "hidden_states")
            site.kept_input = catch
            injection.changes.hook(norm.register_forward_pre_hook(catch, with_kwargs=True))
        else:
            site = ParallelFFNAdapter(ffn, modification, dtype)
        injection.changes.add(place.layer, "pelt_ffn_adapter", site)
        injection.changes.call(find(place.layer, entry), site.__call__)
        name = f"{place.name}.{entry}".removesuffix(".")
        injection.sites.append(Site(name, op, "bottleneck", site))
        frozen = [parameter_of(held.module) for held in ffn.projections]
        if op == "ffn" and (not injection.pack or any(is_shared(holders, p) for p in frozen)):
            site.leave_unpacked()  # a weight cannot lie in two buffers
        elif op == "ffn" and site.why_not_fused() is None:
            site.pack()


def _inject_prompt(model, modification, config, stacks, injection) -> None:
    base = base_of(model)
    for stack in prompted(modification, stacks):
        if stack.prompt.layer is None:
            embedded = base.get_input_embeddings()
            weight, width = embedded.weight, embedded.weight.shape[1]
        else:
            embedded = find(find(base, stack.prompt.layer), stack.attentions[0].q)
            weight, width = weight_of(embedded), shape_of(embedded)[1]
        prompt = Prompt(modification, width, device_of(embedded), _dtype(config, weight))
        injection.changes.add(find(base, stack.owner), "pelt_prompt", prompt)
        attach_prompt(base, stack, prompt, injection)
        name = f"{stack.owner}.embeddings".removeprefix(".")
        injection.sites.append(Site(name, "prompt", "prompt", prompt))


# in this order: an adapter wraps a projection with its LoRA
BUILDERS = {
    "low_rank": _inject_lora,
    "prefix": _inject_prefix,
    "bottleneck": _inject_bottleneck,
    "prompt": _inject_prompt,
}
