"""The targets of a modification in a model: layers, attentions, FFN blocks, linear layers."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.layout import AttentionLayout, FFNLayout, StackLayout
from pelt_fast.layouts.lookup import find, layers_of
from pelt_fast.layouts.names import compiled_from
from pelt_fast.modules.projection_view import ProjectionView


@dataclass(frozen=True)
class TargetLayer:
    """One target layer: ``index`` counts in its stack, ``order`` among the target layers."""

    name: str
    layer: nn.Module
    index: int
    stack: StackLayout
    order: int


def target_layers(
    base: nn.Module, stacks: list[StackLayout], layers: tuple[int, ...] | None = None
) -> Iterator[TargetLayer]:
    """The layers with these indices in each stack; None is every layer. A module that is in a stack
    twice comes once. Raises ValueError for an index that a stack does not have."""
    seen: set[nn.Module] = set()
    for stack in stacks:
        count, order, modules = len(find(base, stack.layers)), 0, dict(layers_of(base, stack))
        for index in range(count) if layers is None else layers:
            if index >= count:
                raise ValueError(
                    f"layers: {stack.layers} of {type(base).__name__} has {count} layers, from 0:"
                    f" there is no layer {index}"
                )
            if index not in modules:
                continue  # another stack describes it
            layer = compiled_from(modules[index])
            if layer not in seen:
                seen.add(layer)
                yield TargetLayer(f"{stack.layers}.{index}", layer, index, stack, order)
                order += 1


def attention_layouts(
    base: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> Iterator[tuple[TargetLayer, AttentionLayout]]:
    """The attentions that are targets. A decoder without its encoder never runs its
    cross-attention. No method is put there, because it could not train."""
    asked = {
        stack: [
            layout
            for layout in stack.attentions
            if layout.kind in modification.where and (layout.kind != "cross" or _encoded(stacks))
        ]
        for stack in stacks
    }
    seen: set[nn.Module] = set()
    with_attention = [stack for stack in stacks if asked[stack]]
    for target in target_layers(base, with_attention, modification.layers):
        for layout in asked[target.stack]:
            module = find(target.layer, layout.module)
            if module not in seen:
                seen.add(module)
                yield target, layout


def _encoded(stacks: list[StackLayout]) -> bool:
    """Whether there is an encoder beside the decoder."""
    return len({stack.layers for stack in stacks}) > 1


def attentions(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules that are targets, by name."""
    for target, layout in attention_layouts(base, modification, stacks):
        yield f"{target.name}.{layout.module}", find(target.layer, layout.module)


def ffn_layouts(base, modification, stacks) -> Iterator[tuple[TargetLayer, FFNLayout]]:
    """The feed-forward blocks that are targets. Raises ValueError for a stack that has none."""
    asked = [stack for stack in stacks if stack.kind in modification.where]
    for target in target_layers(base, asked, modification.layers):
        if target.stack.ffn is None:
            raise ValueError(f"{target.name}: no method on its FFN: {target.stack.no_ffn}")
        yield target, target.stack.ffn


def linears(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a low-rank modification, by name. One that layers share comes once."""
    for target, path, linear in linears_of_layers(base, modification, stacks):
        yield f"{target.name}.{path}", linear


def linears_of_layers(base, modification, stacks) -> Iterator[tuple[TargetLayer, str, nn.Module]]:
    """As :func:`linears`, with the layer that each is in and its path there."""
    seen = set()
    for target, path, linear in _all_linears(base, modification, stacks):
        if identity(linear) not in seen:
            seen.add(identity(linear))
            yield target, path, linear


def identity(linear: nn.Module) -> tuple[nn.Module, str]:
    """Equal for one linear layer, whenever it is looked up: a view of a projection is a new object
    each time."""
    return (linear.owner, linear.name) if isinstance(linear, ProjectionView) else (linear, "")


def _all_linears(base, modification, stacks) -> Iterator[tuple[TargetLayer, str, nn.Module]]:
    group, which = modification.target.split(".")
    if group == "attention":
        for target, layout in attention_layouts(base, modification, stacks):
            path = layout.out if which == "o" else getattr(layout, which)
            if path is not None:  # else it was not found
                yield target, path, find(target.layer, path)
        return
    for target, layout in ffn_layouts(base, modification, stacks):
        paths = [layout.out_proj] if which == "out" else [layout.gate_proj, layout.in_proj]
        for path in filter(None, paths):
            yield target, path, find(target.layer, path)


def prompt_stacks(modification: Modification, stacks: list[StackLayout]) -> Iterator[StackLayout]:
    """The stack that a prompt goes in front of: the first one, which is the encoder's if there is
    an encoder. Empty if it is no target, or if its layout has no prompt."""
    return (stack for stack in stacks[:1] if stack.kind in modification.where and stack.prompt)


def everything_asked(base, modification, stacks) -> Iterator:
    """What a modification changes, of any form."""
    if modification.form == "prompt":
        return prompt_stacks(modification, stacks)
    if "." in modification.target:
        return linears(base, modification, stacks)
    if modification.target == "ffn":
        return ffn_layouts(base, modification, stacks)
    return attentions(base, modification, stacks)
