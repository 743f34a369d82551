"""inject and eject: put a method's sites into a transformers model, and take them out again."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.methods import method as preset
from pelt_fast.modules import (
    FrozenFFN,
    LoRALinear,
    ParallelFFNAdapter,
    PrefixBank,
    PrefixSlice,
    SequentialAdapter,
    SequentialFFNAdapter,
)
from pelt_fast.modules.slot import LORA

from . import attention
from .slots import AttentionSlot, FFNSlot, StackSlot, base_of, find, stacks_of, task_head
from .takeover import MovedDropout, Site, Takeover, takeover_of

logger = logging.getLogger("pelt_fast")

# the config's activation names the ops know
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
    "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip
_ORDER = ("low_rank", "prefix", "bottleneck")  # an adapter wraps a projection with its LoRA


@dataclass(frozen=True)
class _Place:
    """One layer, where it is, and its slots."""

    name: str
    layer: nn.Module
    index: int
    stack: StackSlot


def inject(model: nn.Module, method: str | PeltConfig) -> nn.Module:
    """Put ``method`` into ``model`` in place and freeze the rest; returns the model.

    ``method`` is a preset's name (see :func:`pelt_fast.methods`) or a :class:`PeltConfig`. What
    trains afterwards is the method and, unless the config says otherwise, the task head. Raises
    before anything is changed: ValueError for an unknown method, a model that already carries
    one, an architecture without a table row or an attention that cannot carry a prefix.
    """
    config = preset(method) if isinstance(method, str) else method
    if not isinstance(config, PeltConfig):
        raise TypeError(f"method must be a name or a PeltConfig, got {type(method).__name__}")
    if "_pelt" in model.__dict__:
        present = model._pelt.config.name
        raise ValueError(f"this {type(model).__name__} already carries {present!r}: eject it first")
    stacks = [] if config.is_full or not config.modifications else stacks_of(model)
    _check(model, config, stacks)

    takeover = Takeover(config)
    try:
        _freeze(model, config, takeover)
        for form in _ORDER:
            for modification in config.modifications:
                if modification.form == form:
                    _BUILDERS[form](model, modification, config, stacks, takeover)
    except BaseException:
        _restore(model, takeover)
        raise
    model._pelt = takeover
    return model


def eject(model: nn.Module) -> nn.Module:
    """Take the method out again: the base as it was before inject, bit for bit; returns it.

    The task head gets its weights of before back. Raises ValueError when nothing was injected, or
    when full fine-tuning has made the base itself the method.
    """
    takeover = takeover_of(model)
    if takeover.config.is_full:
        raise ValueError("full fine-tuning trains the base itself: there is nothing to eject")
    _restore(model, takeover)
    del model._pelt
    return model


def _restore(model: nn.Module, takeover: Takeover) -> None:
    for site in takeover.sites:
        if isinstance(site.module, ParallelFFNAdapter):
            site.module.unpack()
    takeover.undo()
    parameters = dict(model.named_parameters())
    for name, trainable in takeover.trainable_before.items():
        parameters[name].requires_grad_(trainable)
    with torch.no_grad():
        for name, value in takeover.head_before.items():
            parameters[name].copy_(value)
            parameters[name].grad = None


def _check(model: nn.Module, config: PeltConfig, stacks: list[StackSlot]) -> None:
    """Everything that can be refused, before anything is changed."""
    base = base_of(model)
    if not config.modifications and not (config.train_head and task_head(model)):
        raise ValueError(
            f"{config.name!r} trains the task head alone, and {type(model).__name__} has none"
        )
    for modification in config.modifications:
        if modification.form == "full":
            continue
        if not any(True for _ in _targets(base, modification, stacks)):
            where = ", ".join(modification.where)
            raise ValueError(
                f"{type(model).__name__} has no {modification.target} in {where} to modify"
            )
        if modification.form == "prefix":
            for _, module in _attentions(base, modification, stacks):
                attention.wrapping(module.config._attn_implementation)
        if modification.form == "low_rank":
            _check_linears(dict(_linears(base, modification, stacks)), modification)


def _check_linears(linears: dict[str, nn.Module], modification: Modification) -> None:
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is a {type(linear).__name__}: LoRA needs an nn.Linear")
    smallest = min(min(linear.weight.shape) for linear in linears.values())
    if modification.size > smallest:
        logger.warning(
            "LoRA of rank %d on %s is wider than a matrix it is on (%d): beyond full rank there is"
            " nothing to gain", modification.size, modification.target, smallest,
        )  # fmt: skip


def _freeze(model: nn.Module, config: PeltConfig, takeover: Takeover) -> None:
    """Freeze the base; keep what is needed to undo it."""
    head = [
        f"{name}.{tensor}"
        for name, child in task_head(model).items()
        for tensor, _ in child.named_parameters()
    ]
    for name, parameter in model.named_parameters():
        takeover.trainable_before[name] = parameter.requires_grad
        trains = config.is_full or (config.train_head and name in head)
        if trains and not config.is_full:
            takeover.head.append(name)
            takeover.head_before[name] = parameter.detach().clone()
        parameter.requires_grad_(trains)


def _places(base: nn.Module, stacks: list[StackSlot]) -> Iterator[_Place]:
    for stack in stacks:
        for index, layer in enumerate(find(base, stack.layers)):
            yield _Place(f"{stack.layers}.{index}", layer, index, stack)


def _attention_slots(
    base: nn.Module, modification: Modification, stacks: list[StackSlot]
) -> Iterator[tuple[_Place, AttentionSlot]]:
    """The attentions the modification asks for. A decoder without its encoder never runs its
    cross-attention: nothing is put there that could not train."""
    whole = len(stacks) > 1
    for place in _places(base, stacks):
        for slot in place.stack.attentions:
            if slot.kind in modification.where and (slot.kind != "cross" or whole):
                yield place, slot


def _attentions(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    for place, slot in _attention_slots(base, modification, stacks):
        yield f"{place.name}.{slot.module}", find(place.layer, slot.module)


def _ffns(base, modification, stacks) -> Iterator[tuple[_Place, FFNSlot]]:
    for place in _places(base, stacks):
        if place.stack.kind in modification.where:
            yield place, place.stack.ffn


def _linears(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers a low-rank modification targets."""
    group, which = modification.target.split(".")
    if group == "attention":
        for place, slot in _attention_slots(base, modification, stacks):
            path = slot.out if which == "o" else getattr(slot, which)
            yield f"{place.name}.{path}", find(place.layer, path)
        return
    for place, slot in _ffns(base, modification, stacks):
        paths = [slot.out_proj] if which == "out" else [slot.gate_proj, slot.in_proj]
        for path in filter(None, paths):
            yield f"{place.name}.{path}", find(place.layer, path)


def _targets(base, modification, stacks) -> Iterator:
    if "." in modification.target:
        return _linears(base, modification, stacks)
    if modification.target == "ffn":
        return _ffns(base, modification, stacks)
    return _attentions(base, modification, stacks)


def _dtype(config: PeltConfig, weight: torch.Tensor) -> torch.dtype:
    """The trainable tensors' dtype beside ``weight``: never narrower than it."""
    wanted = getattr(torch, config.dtype)
    return wanted if wanted.itemsize >= weight.dtype.itemsize else weight.dtype


def _inject_lora(model, modification, config, stacks, takeover) -> None:
    for name, linear in _linears(base_of(model), modification, stacks):
        site = LoRALinear(linear, modification.size, modification.scale, modification.dropout,
                          modification.init, _dtype(config, linear.weight))  # fmt: skip
        takeover.add(linear, LORA, site)
        takeover.call(linear, site.forward)
        takeover.sites.append(Site(name, "lora", "low_rank", site))


def _inject_prefix(model, modification, config, stacks, takeover) -> None:
    base = base_of(model)
    banks: dict[str, PrefixBank] = {}
    for place, slot in _attention_slots(base, modification, stacks):
        module = find(place.layer, slot.module)
        if slot.kind not in banks:
            owner = find(base, place.stack.owner)
            bank = _bank(
                place, slot, module, modification, config, len(find(base, place.stack.layers))
            )
            banks[slot.kind] = bank
            takeover.add(owner, f"pelt_{slot.kind}_prefix", bank)
            takeover.hook(owner.register_forward_pre_hook(attention.still_wrapped))
            takeover.hook(owner.register_forward_pre_hook(bank.before_stack))
        bank = banks[slot.kind]
        takeover.set(
            module, attention.SLICE, PrefixSlice(bank, place.index, modification.composition)
        )
        takeover.sites.append(
            Site(f"{place.name}.{slot.module}", "prefix", "prefix", bank, attention=module)
        )
        choice = attention.wrapping(module.config._attn_implementation)
        if module.config._attn_implementation != choice:
            takeover.set_attention(module.config, choice)


def _bank(place, slot, module, modification, config, layers: int) -> PrefixBank:
    key = find(place.layer, slot.k)
    head_dim = getattr(module, "head_dim", None) or module.attention_head_size
    out_features, width = key.weight.shape
    return PrefixBank(layers, out_features // head_dim, head_dim, width, modification,
                      key.weight.device, _dtype(config, key.weight))  # fmt: skip


def _inject_bottleneck(model, modification, config, stacks, takeover) -> None:
    base = base_of(model)
    if modification.target == "attention":
        for place, slot in _attention_slots(base, modification, stacks):
            linear = find(place.layer, slot.out)
            site = SequentialAdapter(linear, modification, _dtype(config, linear.weight))
            takeover.add(linear, "pelt_adapter", site)
            takeover.call(linear, site.forward)
            takeover.sites.append(Site(f"{place.name}.{slot.out}", "adapter", "bottleneck", site))
        return
    kind = ParallelFFNAdapter if modification.insertion == "parallel" else SequentialFFNAdapter
    for place, slot in _ffns(base, modification, stacks):
        ffn = _take_ffn(model, place.layer, slot, takeover)
        site = kind(ffn, modification, _dtype(config, ffn.in_proj.module.weight))
        takeover.add(place.layer, "pelt_ffn_adapter", site)
        takeover.call(find(place.layer, slot.entry), site.forward)
        is_parallel = kind is ParallelFFNAdapter
        op = "ffn" if is_parallel else "adapter"
        takeover.sites.append(Site(f"{place.name}.{slot.entry}", op, "bottleneck", site))
        if is_parallel and site.why_not_fused() is None:
            site.pack()


def _probability(layer: nn.Module, path: str | None) -> float:
    value = 0.0 if path is None else find(layer, path)
    return float(value.p if isinstance(value, nn.Dropout) else value)


def _take_ffn(model: nn.Module, layer: nn.Module, slot: FFNSlot, takeover: Takeover) -> FrozenFFN:
    """Describe the block and, where the layer spells it out, silence what the site will run."""
    ffn = FrozenFFN(
        find(layer, slot.in_proj), find(layer, slot.out_proj),
        None if slot.gate_proj is None else find(layer, slot.gate_proj),
        find(layer, slot.activation),
        _ACTIVATIONS.get(getattr(base_of(model).config, slot.config_activation)),
        _probability(layer, slot.activation_dropout), _probability(layer, slot.output_dropout),
    )  # fmt: skip
    if slot.is_container:
        return ffn
    for path in (slot.activation, slot.out_proj):
        parent, _, name = path.rpartition(".")
        takeover.bypass(find(layer, parent), name)
    for path in filter(None, (slot.activation_dropout, slot.output_dropout)):
        parent, _, name = path.rpartition(".")
        owner = find(layer, parent)
        if isinstance(getattr(owner, name), nn.Module):
            takeover.bypass(owner, name)
        else:
            takeover.set(owner, name, 0.0)
    for path in slot.output_dropout_also:
        hook = MovedDropout(ffn.output_dropout_p)
        takeover.hook(find(layer, path).register_forward_hook(hook))
    return ffn


_BUILDERS = {
    "low_rank": _inject_lora,
    "prefix": _inject_prefix,
    "bottleneck": _inject_bottleneck,
}
