"""How each form gets into a model: its sites are made, registered, and called."""

import torch
from torch import nn

from pelt_fast.config import Modification, PeltConfig
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
from pelt_fast.modules.caught import Caught
from pelt_fast.modules.fused_projection import FusedProjection
from pelt_fast.modules.part import (
    FUSED,
    LORA,
    Part,
    device_of,
    host_of,
    parameter_of,
    shape_of,
    weight_of,
)
from pelt_fast.modules.slot import Slot

from . import attention
from .blocks import describe_block, take_block
from .generate import take_generate
from .handles import compiled_from
from .places import attention_slots, ffns, linears, prompted
from .prompt import attach_prompt
from .shared import holders_of, is_shared
from .slots import FFNSlot, base_of, find
from .takeover import Site, Takeover


def _dtype(config: PeltConfig, *weights: torch.Tensor) -> torch.dtype:
    """The trainable tensors' dtype beside ``weights``: never narrower than one of them."""
    floating = (weight.dtype for weight in weights if weight.is_floating_point())
    dtypes = [getattr(torch, config.dtype), *floating]
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def _inject_lora(model, modification, config, stacks, takeover) -> None:
    for name, linear in linears(base_of(model), modification, stacks):
        if LORA in host_of(linear)._modules:
            continue  # another target's, of the same layer: tied q and k
        fused = isinstance(linear, Part) and linear.rows is not None
        linear = _held(linear, takeover) if fused else linear
        site = LoRALinear(linear, modification.size, modification.scale, modification.dropout,
                          modification.init, _dtype(config, weight_of(linear)))  # fmt: skip
        takeover.add(host_of(linear), LORA, site)
        if not fused:  # else what holds the part runs
            takeover.call(host_of(linear), site.__call__)
        takeover.sites.append(Site(name, "lora", "low_rank", site))


def _held(part: Part, takeover: Takeover) -> Part:
    """The part, held by what runs in the place of its owner."""
    if FUSED not in part.owner._modules:
        fused = FusedProjection(part.owner)
        takeover.add(part.owner, FUSED, fused)
        takeover.call(part.owner, fused.__call__)
    fused = part.owner._modules[FUSED]
    return fused._modules.get(part.name) or fused.part(part)


def _inject_prefix(model, modification, config, stacks, takeover) -> None:
    base = base_of(model)
    banks: dict[tuple[str, str], PrefixBank] = {}
    for place, slot in attention_slots(base, modification, stacks):
        module = find(place.layer, slot.module)
        key = place.stack.layers, slot.kind
        if key not in banks:
            owner = find(base, place.stack.owner)
            layers = find(base, place.stack.layers)
            # the layers it serves, each once, in order
            served = {compiled_from(layers[i]) for i in modification.layers or range(len(layers))}
            bank = banks[key] = _bank(place, slot, module, modification, config, len(served))
            takeover.add(owner, _free_name(owner, _bank_name(slot.kind, modification)), bank)
            takeover.hook(owner.register_forward_pre_hook(attention.still_wrapped))
            takeover.hook(owner.register_forward_pre_hook(bank.before_stack))
            takeover.hook(owner.register_forward_hook(bank.after_stack))
        bank = banks[key]
        takeover.set(
            module, attention.SLICE, PrefixSlice(bank, place.order, modification.composition)
        )
        queries = shape_of(find(place.layer, slot.q))[0]
        takeover.sites.append(Site(f"{place.name}.{slot.module}", "prefix", "prefix", bank,
                                   attention=module, queries=queries))  # fmt: skip
        attention.wrap(module, takeover)
    take_generate(model, takeover)


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


def reads_residual(modification: Modification, slot: FFNSlot) -> bool:
    """Whether a parallel adapter reads the stream before the block's norm. In a post-norm model
    that stream is the block's own input: there is nothing else to read."""
    reads = slot.adapter_reads if modification.reads == "default" else modification.reads
    return reads == "residual" and slot.norm is not None


def _bank(place, slot, module, modification, config, layers: int) -> PrefixBank:
    key, head_dim = find(place.layer, slot.k), head_dim_of(module)
    out_features, width = shape_of(key)
    return PrefixBank(layers, out_features // head_dim, head_dim, width, modification,
                      device_of(key), _dtype(config, weight_of(key)))  # fmt: skip


def _inject_bottleneck(model, modification, config, stacks, takeover) -> None:
    if modification.target == "ffn":
        _inject_ffn(model, modification, config, stacks, takeover)
    elif modification.reads == "query":
        _inject_query_heads(model, modification, config, stacks, takeover)
    else:
        _inject_at_output(model, modification, config, stacks, takeover)


def _inject_at_output(model, modification, config, stacks, takeover) -> None:
    """Adapters that run where an attention's output projection is called."""
    made: dict[nn.Module, nn.Module] = {}  # by projection: one of two attentions has one adapter
    for place, slot in attention_slots(base_of(model), modification, stacks):
        linear, module = find(place.layer, slot.out), find(place.layer, slot.module)
        host = host_of(linear)
        if host in made:
            if modification.insertion == "parallel":
                caught = made[host].caught
                takeover.hook(module.register_forward_pre_hook(caught, with_kwargs=True))
            continue
        dtype = _dtype(config, weight_of(linear))
        if modification.insertion == "sequential":
            site = SequentialAdapter(linear, modification, dtype)
        elif modification.target == "heads":
            heads = shape_of(linear)[1] // head_dim_of(module)
            site = MultiHeadAdapter(linear, heads, modification, dtype)
        else:
            width = shape_of(find(place.layer, slot.q))[1]
            site = ParallelAttentionAdapter(linear, width, modification, dtype)
        if modification.insertion == "parallel":
            takeover.hook(module.register_forward_pre_hook(site.caught, with_kwargs=True))
        op = "heads" if modification.target == "heads" else "adapter"
        made[host] = site
        takeover.add(host, "pelt_heads" if op == "heads" else "pelt_adapter", site)
        takeover.call(host, site.__call__)
        takeover.sites.append(Site(f"{place.name}.{slot.out}", op, "bottleneck", site))


def _inject_query_heads(model, modification, config, stacks, takeover) -> None:
    for place, slot in attention_slots(base_of(model), modification, stacks):
        module, key = find(place.layer, slot.module), find(place.layer, slot.k)
        head_dim = head_dim_of(module)
        heads, dtype = shape_of(key)[0] // head_dim, _dtype(config, weight_of(key))
        site = QueryHeads(heads, head_dim, modification, device_of(key), dtype)
        site.slot = Slot(key)
        takeover.add(module, "pelt_heads", site)
        takeover.set(module, attention.SLICE, QuerySlice(site))
        name = f"{place.name}.{slot.module}"
        queries = shape_of(find(place.layer, slot.q))[0]
        takeover.sites.append(
            Site(name, "heads", "bottleneck", site, attention=module, queries=queries)
        )
        attention.wrap(module, takeover)
        if place.order == 0:
            owner = find(base_of(model), place.stack.owner)
            takeover.hook(owner.register_forward_pre_hook(attention.still_wrapped))


def _inject_ffn(model, modification, config, stacks, takeover) -> None:
    holders, blocks = holders_of(model), set()
    for place, slot in ffns(base_of(model), modification, stacks):
        behind = modification.placement in ("after_norm", "around_norm")
        block = place.layer if behind else find(place.layer, slot.entry)
        if block in blocks:
            continue  # a block that layers share has one adapter
        blocks.add(block)
        base, into, out = base_of(model), slot.in_proj, slot.out_proj
        if behind:
            ffn = describe_block(base, place.layer, slot)
        else:
            ffn = take_block(base, place, slot, takeover)
        dtype = _dtype(config, *(weight_of(find(place.layer, path)) for path in (into, out)))
        entry, op = slot.entry, "ffn" if modification.insertion == "parallel" else "adapter"
        if modification.placement == "around_norm" and slot.norm_after is not None:
            entry = slot.norm_after
            site = NormAdapter(find(place.layer, entry), ffn, modification, dtype)
        elif behind:
            site, entry = LayerAdapter(place.layer, ffn, modification, dtype), ""
        elif modification.insertion == "sequential":
            site = SequentialFFNAdapter(ffn, modification, dtype)
        elif reads_residual(modification, slot):
            site = ResidualFFNAdapter(ffn, modification, dtype)
            norm = find(place.layer, slot.norm)
            catch = Caught("input" if isinstance(norm, nn.LayerNorm) else "hidden_states")
            site.caught = catch
            takeover.hook(norm.register_forward_pre_hook(catch, with_kwargs=True))
        else:
            site = ParallelFFNAdapter(ffn, modification, dtype)
        takeover.add(place.layer, "pelt_ffn_adapter", site)
        takeover.call(find(place.layer, entry), site.__call__)
        name = f"{place.name}.{entry}".removesuffix(".")
        takeover.sites.append(Site(name, op, "bottleneck", site))
        frozen = [parameter_of(held.module) for held in ffn.projections]
        if op == "ffn" and (not takeover.pack or any(is_shared(holders, p) for p in frozen)):
            site.leave_unpacked()  # a weight cannot lie in two buffers
        elif op == "ffn" and site.why_not_fused() is None:
            site.pack()


def _inject_prompt(model, modification, config, stacks, takeover) -> None:
    base = base_of(model)
    for stack in prompted(modification, stacks):
        if stack.prompt.layer is None:
            embedded = base.get_input_embeddings()
            weight, width = embedded.weight, embedded.weight.shape[1]
        else:
            embedded = find(find(base, stack.prompt.layer), stack.attentions[0].q)
            weight, width = weight_of(embedded), shape_of(embedded)[1]
        prompt = Prompt(modification, width, device_of(embedded), _dtype(config, weight))
        takeover.add(find(base, stack.owner), "pelt_prompt", prompt)
        attach_prompt(base, stack, prompt, takeover)
        name = f"{stack.owner}.embeddings".removeprefix(".")
        takeover.sites.append(Site(name, "prompt", "prompt", prompt))


# in this order: an adapter wraps a projection with its LoRA
BUILDERS = {
    "low_rank": _inject_lora,
    "prefix": _inject_prefix,
    "bottleneck": _inject_bottleneck,
    "prompt": _inject_prompt,
}
