"""The places of a model that a modification asks for: layers, attentions, blocks, linear layers."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pelt_fast.config import Modification
from pelt_fast.layouts.layout import AttentionLayout, FFNLayout, StackLayout
from pelt_fast.layouts.lookup import find
from pelt_fast.layouts.names import compiled_from
from pelt_fast.modules.projection_view import ProjectionView


@dataclass(frozen=True)
class Place:
    """One layer, where it is (``index`` in the stack's list, ``order`` among the places asked for),
    and its layouts."""

    name: str
    layer: nn.Module
    index: int
    stack: StackLayout
    order: int


def places(
    base: nn.Module, stacks: list[StackLayout], layers: tuple[int, ...] | None = None
) -> Iterator[Place]:
    """The layers with these indices in each stack, every layer where there are none; one that is
    there twice is one place. Raises ValueError for one that a stack does not have."""
    seen: set[nn.Module] = set()
    for stack in stacks:
        there, order = find(base, stack.layers), 0
        for index in range(len(there)) if layers is None else layers:
            if index >= len(there):
                raise ValueError(
                    f"{stack.layers} of {type(base).__name__} has {len(there)} layers, from 0:"
                    f" there is no layer {index}"
                )
            layer = compiled_from(there[index])
            if layer not in seen:
                seen.add(layer)
                yield Place(f"{stack.layers}.{index}", layer, index, stack, order)
                order += 1


def attention_layouts(
    base: nn.Module, modification: Modification, stacks: list[StackLayout]
) -> Iterator[tuple[Place, AttentionLayout]]:
    """The attentions the modification asks for. A decoder without its encoder never runs its
    cross-attention: nothing is put there that could not train."""
    asked = {
        stack: [
            layout
            for layout in stack.attentions
            if layout.kind in modification.where and (layout.kind != "cross" or len(stacks) > 1)
        ]
        for stack in stacks
    }
    seen: set[nn.Module] = set()
    for place in places(base, [stack for stack in stacks if asked[stack]], modification.layers):
        for layout in asked[place.stack]:
            module = find(place.layer, layout.module)
            if module not in seen:
                seen.add(module)
                yield place, layout


def attentions(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules, by name."""
    for place, layout in attention_layouts(base, modification, stacks):
        yield f"{place.name}.{layout.module}", find(place.layer, layout.module)


def ffns(base, modification, stacks) -> Iterator[tuple[Place, FFNLayout]]:
    """The feed-forward blocks."""
    asked = [stack for stack in stacks if stack.kind in modification.where]
    for place in places(base, asked, modification.layers):
        if place.stack.ffn is None:
            raise ValueError(f"{place.name}: no method on its FFN: {place.stack.no_ffn}")
        yield place, place.stack.ffn


def linears(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers a low-rank modification targets, one that layers share once."""
    for place, path, linear in placed_linears(base, modification, stacks):
        yield f"{place.name}.{path}", linear


def placed_linears(base, modification, stacks) -> Iterator[tuple[Place, str, nn.Module]]:
    """And the layer each is in, with its path there."""
    seen = set()
    for place, path, linear in _every_linear(base, modification, stacks):
        if identity(linear) not in seen:
            seen.add(identity(linear))
            yield place, path, linear


def identity(linear: nn.Module) -> tuple[nn.Module, str]:
    """What tells one linear layer from another: a part is made anew each time it is looked for."""
    return (linear.owner, linear.name) if isinstance(linear, ProjectionView) else (linear, "")


def _every_linear(base, modification, stacks) -> Iterator[tuple[Place, str, nn.Module]]:
    group, which = modification.target.split(".")
    if group == "attention":
        for place, layout in attention_layouts(base, modification, stacks):
            path = layout.out if which == "o" else getattr(layout, which)
            yield place, path, find(place.layer, path)
        return
    for place, layout in ffns(base, modification, stacks):
        paths = [layout.out_proj] if which == "out" else [layout.gate_proj, layout.in_proj]
        for path in filter(None, paths):
            yield place, path, find(place.layer, path)


def prompted(modification: Modification, stacks: list[StackLayout]) -> Iterator[StackLayout]:
    """The stack a prompt stands in front of: the first, that of an encoder where there is one."""
    return (stack for stack in stacks[:1] if stack.kind in modification.where and stack.prompt)


def targets(base, modification, stacks) -> Iterator:
    """What a modification changes, whatever its kind."""
    if modification.form == "prompt":
        return prompted(modification, stacks)
    if "." in modification.target:
        return linears(base, modification, stacks)
    if modification.target == "ffn":
        return ffns(base, modification, stacks)
    return attentions(base, modification, stacks)
