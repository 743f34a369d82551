"""inject and eject: put a method's sites into a transformers model, and take them out again."""

import logging

import torch
from torch import nn

from pelt_fast.config import Modification, PeltConfig
from pelt_fast.deprecated import renamed_keyword
from pelt_fast.layouts.layout import Layout, StackLayout
from pelt_fast.layouts.lookup import base_of, find, stacks_of, task_head
from pelt_fast.layouts.names import parameters_of, unwrapped
from pelt_fast.modules import ParallelFFNAdapter
from pelt_fast.modules.hooked import at_hand, holders
from pelt_fast.modules.projection_view import ProjectionView, is_linear, shape_of
from pelt_fast.presets import method as preset

from . import attention_interface as attention
from .build import BUILDERS, head_dim_of, reads_residual
from .ffn_block import check_block
from .folded_weights import unfold
from .handles import carrier_of, mark, refuse_second
from .own_configs import own_configs, return_configs
from .record import Injection, injection_of
from .self_test import SelfTest
from .targets import attention_layouts, attentions, ffns, identity, linears, targets
from .watch import check_free, watch

logger = logging.getLogger("pelt_fast")


@renamed_keyword("slots", "layout")
def inject(
    model: nn.Module, method: str | PeltConfig, *, layout: Layout | None = None, pack: bool = True
) -> nn.Module:
    """Put ``method`` into ``model`` in place and freeze the rest; returns the model.

    ``method`` is a preset's name (see :func:`pelt_fast.methods`) or a :class:`PeltConfig`;
    ``layout`` a row of your own for an architecture the table has none for. ``pack=False`` leaves
    frozen FFN weights in their own storage, where FSDP2 (``fully_shard``) wants them; else a
    widened FFN moves them into one buffer with room for the adapter. What trains afterwards is the
    method and, unless the config says otherwise, the task head. A wrapper (torch.compile, DDP,
    PEFT) stands for the model in it, and is what is returned. Raises before anything is
    changed: ValueError for an unknown method, a model that already carries one, an architecture
    without a row, a place the method cannot be put on, an attention that cannot carry a prefix.
    """
    config = preset(method) if isinstance(method, str) else method
    if not isinstance(config, PeltConfig):
        raise TypeError(f"method must be a name or a PeltConfig, got {type(method).__name__}")
    handle, model = model, unwrapped(model)
    refuse_second(model)
    stacks = [] if config.is_full or not config.modifications else stacks_of(model, layout)
    _check(model, config, stacks)

    proof = None if layout is None or not stacks else SelfTest(model, stacks)
    injection = Injection(config, pack)
    try:
        base = base_of(model)
        mark(model, [base, *(find(base, s.owner) for s in stacks)], injection)
        if any(m.form == "prefix" or m.reads == "query" for m in config.modifications):
            own_configs(model, injection)
        _freeze(model, config, stacks, injection)
        for form, build in BUILDERS.items():
            for modification in config.modifications:
                if modification.form == form:
                    build(model, modification, config, stacks, injection)
        if proof is not None:
            proof.check(injection)
        watch(model, [find(base_of(model), stack.owner) for stack in stacks], injection)
    except BaseException:
        _restore(model, injection)
        raise
    model._pelt = injection
    return handle


def eject(model: nn.Module) -> nn.Module:
    """Take the method out again: the base as it was before inject, bit for bit; returns it.

    The task head gets its weights of before back. A hook of accelerate keeps its place around what
    was there before. Raises ValueError when nothing was injected, or when full fine-tuning, or a
    merge that kept no copy, has made the base itself the method; RuntimeError when another
    library's wrapper holds the method, and says what to take off first.
    """
    handle, model = model, carrier_of(model)
    injection = injection_of(model)
    if injection.config.is_full:
        raise ValueError("full fine-tuning trains the base itself: there is nothing to eject")
    check_free(model, injection)
    with at_hand(holders(model, _moved(model, injection)), write=True):
        if injection.merged:
            unfold(injection)
        _restore(model, injection)
    del model._pelt
    return handle


def _moved(model: nn.Module, injection: Injection) -> set[str]:
    """The model's own parameters that training changed."""
    before = injection.before.trained
    with at_hand(holders(model, before)):
        return {
            name
            for name, parameter in model.named_parameters()
            if name in before and not (parameter.is_meta or torch.equal(parameter, before[name]))
        }


def _restore(model: nn.Module, injection: Injection) -> None:
    for site in injection.sites:
        if isinstance(site.module, ParallelFFNAdapter):
            site.module.unpack()
    return_configs(injection)
    injection.changes.undo()
    parameters = parameters_of(model)
    for name, trainable in injection.trainable_before.items():
        if name in parameters:  # a module may have been replaced
            parameters[name].requires_grad_(trainable)
    with torch.no_grad():
        for name, value in injection.before.trained.items():
            parameter = parameters.get(name)
            if parameter is not None and not parameter.is_meta:  # else away, and as it was
                parameter.copy_(value)
                parameter.grad = None


def _check(model: nn.Module, config: PeltConfig, stacks: list[StackLayout]) -> None:
    """Everything that can be refused, before anything is changed."""
    base = base_of(model)
    _check_whole(model)
    if not config.modifications and not (config.train_head and task_head(model)):
        raise ValueError(
            f"{config.name!r} trains the task head alone, and {type(model).__name__} has none"
        )
    for modification in config.modifications:
        if modification.form == "full":
            continue
        if modification.form == "bias":
            found = bias_names(model, modification, stacks)
        else:
            found = list(targets(base, modification, stacks))
        first = {stack.kind for stack in stacks[:1]}
        if not found and modification.form == "prompt" and first & set(modification.where):
            raise ValueError(f"{type(model).__name__} has no place for a prompt in the table")
        if not found:
            what = "biases" if modification.form == "bias" else modification.target
            where = ", ".join(modification.where)
            raise ValueError(f"{type(model).__name__} has no {what} in {where} to modify")
        if modification.form == "prefix" or modification.reads == "query":
            for _, module in attentions(base, modification, stacks):
                attention.check(module)
        if modification.placement == "around_norm":
            _check_norms(model, modification, stacks)
        if modification.form == "low_rank":
            _check_linears(dict(linears(base, modification, stacks)), modification)
        if modification.form == "bottleneck" and modification.target == "heads":
            _check_heads(base, modification, stacks)
        if modification.form == "bottleneck" and modification.target == "ffn":
            for place, layout in ffns(base, modification, stacks):
                check_block(base, place, layout, modification)
    _check_parts(base, config, stacks)
    _check_shared(base, config, stacks)


def _check_shared(base: nn.Module, config: PeltConfig, stacks: list[StackLayout]) -> None:
    """What stands on a layer that is in two places has to be one thing in both."""
    loras: dict[tuple, tuple[str, tuple]] = {}
    for modification in config.modifications:
        if modification.form == "low_rank":
            wanted = (modification.size, modification.scale, modification.dropout,
                      modification.init)  # fmt: skip
            for name, linear in linears(base, modification, stacks):
                first, there = loras.setdefault(identity(linear), (name, wanted))
                if there != wanted:
                    raise ValueError(
                        f"{first} and {name} are one layer: two LoRA of other size, scale, dropout"
                        " or init cannot both be on it"
                    )
        if modification.form == "bottleneck" and modification.target == "ffn":
            _check_blocks(base, modification, stacks)


def _check_blocks(base: nn.Module, modification: Modification, stacks: list[StackLayout]) -> None:
    blocks: dict[nn.Module, str] = {}
    if modification.placement in ("after_norm", "around_norm"):
        return
    for place, layout in ffns(base, modification, stacks):
        name = f"{place.name}.{layout.entry}"
        first = blocks.setdefault(find(place.layer, layout.entry), name)
        if first != name and (not layout.is_container or reads_residual(modification, layout)):
            raise ValueError(
                f"{first} and {name} are one block, which two layers run each in its own way: an"
                " adapter on it cannot be in both. Give each layer its own, or leave the FFN out"
            )


def _check_whole(model: nn.Module) -> None:
    """Sharded weights: a site would read one rank's part as if it were all."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor
            placements = ", ".join(map(str, parameter.placements))
            raise ValueError(
                f"{name} is sharded already ({placements}): inject first, then fully_shard. A"
                " tensor-parallel plan is not supported: its collectives stand inside the"
                " projections that a method's sites run in the place of"
            )


def _check_parts(base: nn.Module, config: PeltConfig, stacks: list[StackLayout]) -> None:
    """Parts of one matrix read one dropped input."""
    drops: dict[nn.Module, float] = {}
    for modification in config.modifications:
        if modification.form != "low_rank":
            continue
        for name, linear in linears(base, modification, stacks):
            if not isinstance(linear, ProjectionView):
                continue
            p = drops.setdefault(linear.owner, modification.dropout)
            if p != modification.dropout:
                raise ValueError(
                    f"{name} shares its matrix with another place of LoRA: their dropouts must be"
                    f" the same, got {p} and {modification.dropout}"
                )


def bias_names(
    model: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> list[str]:
    """The base's bias vectors in the stacks the modification asks for, by their names in
    ``model``."""
    base = base_of(model)
    owners = [stack.owner for stack in stacks if stack.kind in modification.where]
    names = {parameter: name for name, parameter in parameters_of(model).items()}
    return [
        names[parameter]
        for name, parameter in parameters_of(base).items()
        if name.split(".")[-1] == "bias" and any(_inside(name, owner, stacks) for owner in owners)
    ]


def _inside(name: str, owner: str, stacks: list[StackLayout]) -> bool:
    """Whether a parameter is ``owner``'s; with one stack, everything of the base model is."""
    return len(stacks) == 1 or not owner or name.startswith(f"{owner}.")


def _check_heads(base: nn.Module, modification: Modification, stacks: list[StackLayout]) -> None:
    if modification.reads == "query":
        return
    for place, layout in attention_layouts(base, modification, stacks):
        inputs, out = (shape_of(find(place.layer, path))[1] for path in (layout.q, layout.out))
        if inputs != out:
            dim = head_dim_of(find(place.layer, layout.module))
            raise ValueError(
                f"{place.name}.{layout.module}: a bottleneck for each head reads a slice of the"
                f" input, which is {inputs} wide; {out // dim} heads of {dim} make {out}."
                " reads='query' has no such need"
            )


def _check_norms(model: nn.Module, modification: Modification, stacks: list[StackLayout]) -> None:
    """Whether a norm stands behind a block is no guess: the row has to say which it has."""
    for place, layout in ffns(base_of(model), modification, stacks):
        if layout.norm is None and layout.norm_after is None:
            raise ValueError(
                f"{place.name}: an adapter around the norm of a block needs its FFNLayout to name"
                " norm (in front of a pre-norm block) or norm_after (behind a post-norm one);"
                " placement='after_norm' puts it on the layer's output, whichever it is"
            )


def _check_linears(linears: dict[str, nn.Module], modification: Modification) -> None:
    for name, linear in linears.items():
        if not is_linear(linear):
            raise ValueError(f"{name} is a {type(linear).__name__}: LoRA needs a linear layer")
    smallest = min(min(shape_of(linear)) for linear in linears.values())
    if modification.size > smallest:
        logger.warning(
            "LoRA of rank %d on %s is wider than a matrix it is on (%d): beyond full rank there is"
            " nothing to gain", modification.size, modification.target, smallest,
        )  # fmt: skip


def _freeze(
    model: nn.Module, config: PeltConfig, stacks: list[StackLayout], injection: Injection
) -> None:
    """Freeze the base; keep what is needed to undo it."""
    if config.train_head and not config.is_full:
        injection.head = head_names(model)
    for modification in config.modifications:
        if modification.form == "bias":
            injection.biases = bias_names(model, modification, stacks)
    trained = injection.own_trained
    if not config.is_full:
        injection.changes.add(model, "pelt_before", injection.before)
    with at_hand(holders(model, trained)):
        for name, parameter in parameters_of(model).items():
            injection.trainable_before[name] = parameter.requires_grad
            if name in trained:
                injection.before.trained[name] = parameter.detach().clone()
            parameter.requires_grad_(config.is_full or name in trained)


def head_names(model: nn.Module) -> list[str]:
    """The task head's parameters; one that is read outside of it, too, is the base's."""
    inside = {module for child in task_head(model).values() for module in child.modules()}
    outside = {p for m in model.modules() if m not in inside for p in m._parameters.values()}
    head = {p for module in inside for p in module._parameters.values()} - outside
    return [name for name, parameter in parameters_of(model).items() if parameter in head]
