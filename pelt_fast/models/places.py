"""The places of a model that a modification asks for: layers, attentions, blocks, linear layers."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pelt_fast.config import Modification

from .slots import AttentionSlot, FFNSlot, StackSlot, find


@dataclass(frozen=True)
class Place:
    """One layer, where it is, and its slots."""

    name: str
    layer: nn.Module
    index: int
    stack: StackSlot


def places(base: nn.Module, stacks: list[StackSlot]) -> Iterator[Place]:
    """Every layer."""
    for stack in stacks:
        for index, layer in enumerate(find(base, stack.layers)):
            yield Place(f"{stack.layers}.{index}", layer, index, stack)


def attention_slots(
    base: nn.Module, modification: Modification, stacks: list[StackSlot]
) -> Iterator[tuple[Place, AttentionSlot]]:
    """The attentions the modification asks for. A decoder without its encoder never runs its
    cross-attention: nothing is put there that could not train."""
    whole = len(stacks) > 1
    for place in places(base, stacks):
        for slot in place.stack.attentions:
            if slot.kind in modification.where and (slot.kind != "cross" or whole):
                yield place, slot


def attentions(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules, by name."""
    for place, slot in attention_slots(base, modification, stacks):
        yield f"{place.name}.{slot.module}", find(place.layer, slot.module)


def ffns(base, modification, stacks) -> Iterator[tuple[Place, FFNSlot]]:
    """The feed-forward blocks."""
    for place in places(base, stacks):
        if place.stack.kind in modification.where:
            if place.stack.ffn is None:
                raise ValueError(f"{place.name}: no method on its FFN: {place.stack.no_ffn}")
            yield place, place.stack.ffn


def linears(base, modification, stacks) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers a low-rank modification targets."""
    group, which = modification.target.split(".")
    if group == "attention":
        for place, slot in attention_slots(base, modification, stacks):
            path = slot.out if which == "o" else getattr(slot, which)
            yield f"{place.name}.{path}", find(place.layer, path)
        return
    for place, slot in ffns(base, modification, stacks):
        paths = [slot.out_proj] if which == "out" else [slot.gate_proj, slot.in_proj]
        for path in filter(None, paths):
            yield f"{place.name}.{path}", find(place.layer, path)


def prompted(modification: Modification, stacks: list[StackSlot]) -> Iterator[StackSlot]:
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
