"""Sites on attentions: prefixes, and adapters on the attention's input, heads or output."""

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.layout import AttentionLayout, StackLayout
from pelt_fast.layouts.lookup import base_of, find, layers_of
from pelt_fast.layouts.names import compiled_from
from pelt_fast.modules import (
    MultiHeadAdapter,
    ParallelAttentionAdapter,
    PrefixBank,
    PrefixSlice,
    QueryHeads,
    QuerySlice,
    SequentialAdapter,
)
from pelt_fast.modules.frozen_module import FrozenModule
from pelt_fast.modules.prefix_run import AttentionSlice
from pelt_fast.modules.projection_view import device_of, host_of, shape_of, weight_of

from . import attention_interface as attention
from .dimensions import head_dim_of, key_heads_of, trained_dtype
from .record import Injection, Site
from .targets import TargetLayer, attention_layouts


def build_prefix(model, modification, stacks, injection) -> None:
    """Prefixes on attentions (paper, section 2.2 and equation 5). One bank for each stack and kind
    of attention holds the keys and values of all its layers."""
    base = base_of(model)
    banks: dict[tuple[StackLayout, str], PrefixBank] = {}
    for target, layout in attention_layouts(base, modification, stacks):
        key = target.stack, layout.kind
        if key not in banks:
            banks[key] = _add_bank(base, target, layout, modification, injection)
        bank = banks[key]
        layer_slice = PrefixSlice(bank, target.order, modification.composition)
        _run_inside(target, layout, bank, layer_slice, injection, op="prefix", form="prefix")


def _add_bank(
    base: nn.Module,
    target: TargetLayer,
    layout: AttentionLayout,
    modification: Modification,
    injection: Injection,
) -> PrefixBank:
    """Make a bank, and register it with its stack."""
    stack, changes = target.stack, injection.changes
    owner, layers = find(base, stack.owner), dict(layers_of(base, stack))
    # the layers it serves, each once
    served = {compiled_from(layers[i]) for i in modification.layers or layers if i in layers}
    key, head_dim = find(target.layer, layout.k), head_dim_of(target.layer, layout)
    heads, width = key_heads_of(target.layer, layout), shape_of(key)[1]
    bank = PrefixBank(len(served), heads, head_dim, width, modification,
                      device_of(key), trained_dtype(injection.config, weight_of(key)))  # fmt: skip
    changes.add(owner, _free_name(owner, _bank_name(layout.kind, modification), injection), bank)
    _check_in_each_forward(owner, injection)
    changes.hook(owner.register_forward_pre_hook(bank.before_stack))
    changes.hook(owner.register_forward_hook(bank.runs.end, always_call=True))
    return bank


def _check_in_each_forward(owner: nn.Module, injection: Injection) -> None:
    """Check the choice of the attention, once in a forward: stacks may have one owner."""
    if attention.still_wrapped not in owner._forward_pre_hooks.values():
        injection.changes.hook(owner.register_forward_pre_hook(attention.still_wrapped))


def _bank_name(kind: str, modification: Modification) -> str:
    """The name of a bank. Prefixes on different layers of one kind have different names."""
    first = "" if modification.layers is None else f"_{modification.layers[0]}"
    return f"pelt_{kind}_prefix{first}"


def _free_name(owner: nn.Module, name: str, injection: Injection) -> str:
    """A child name that is free: numbered where two stacks of one owner would have the same."""
    free, number = name, 2
    while injection.changes.child(owner, free) is not None:
        free, number = f"{name}_{number}", number + 1
    return free


def _run_inside(
    target: TargetLayer,
    layout: AttentionLayout,
    site: nn.Module,
    layer_slice: AttentionSlice,
    injection: Injection,
    *,
    op: str,
    form: str,
) -> None:
    """Let the attention function find a site's slice on the module, and record the site."""
    module = find(target.layer, layout.module)
    injection.changes.set(module, attention.SLICE, layer_slice)
    queries = shape_of(find(target.layer, layout.q))[0]
    found = dict(attention=module, slice=layer_slice, queries=queries)
    name = f"{target.name}.{layout.module}"
    injection.sites.append(Site(name, op, form, site, **found))
    attention.wrap(module, injection)


def build_query_heads(model, modification, stacks, injection) -> None:
    """Bottlenecks for each head that read the query projection, inside the attention function."""
    base = base_of(model)
    for target, layout in attention_layouts(base, modification, stacks):
        module, key = find(target.layer, layout.module), find(target.layer, layout.k)
        head_dim, heads = head_dim_of(target.layer, layout), key_heads_of(target.layer, layout)
        dtype = trained_dtype(injection.config, weight_of(key))
        site = QueryHeads(heads, head_dim, modification, device_of(key), dtype)
        site.frozen = FrozenModule(key)
        injection.changes.add(module, "pelt_heads", site)
        one = QuerySlice(site)
        _run_inside(target, layout, site, one, injection, op="heads", form="bottleneck")
        _check_in_each_forward(find(base, target.stack.owner), injection)


def build_attention_adapters(model, modification, stacks, injection) -> None:
    """Adapters that run where an attention's output projection is called."""
    sites: dict[nn.Module, nn.Module] = {}  # by projection: two attentions may share one
    parallel, changes = modification.insertion == "parallel", injection.changes
    for target, layout in attention_layouts(base_of(model), modification, stacks):
        host, module = host_of(find(target.layer, layout.out)), find(target.layer, layout.module)
        is_new = host not in sites
        if is_new:
            sites[host] = _attention_adapter(target, layout, modification, injection)
        site = sites[host]
        if parallel:
            changes.hook(module.register_forward_pre_hook(site.kept_input, with_kwargs=True))
        if is_new:
            op = "heads" if modification.target == "heads" else "adapter"
            changes.add(host, f"pelt_{op}", site)
            changes.call(host, site.__call__)
            name = f"{target.name}.{layout.out}"
            injection.sites.append(Site(name, op, "bottleneck", site))


def _attention_adapter(
    target: TargetLayer, layout: AttentionLayout, modification: Modification, injection: Injection
) -> nn.Module:
    linear = find(target.layer, layout.out)
    dtype = trained_dtype(injection.config, weight_of(linear))
    if modification.insertion == "sequential":
        return SequentialAdapter(linear, modification, dtype)
    if modification.target == "heads":
        heads = shape_of(linear)[1] // head_dim_of(target.layer, layout)
        return MultiHeadAdapter(linear, heads, modification, dtype)
    width = shape_of(find(target.layer, layout.q))[1]
    return ParallelAttentionAdapter(linear, width, modification, dtype)
