"""The layout of a model, from one forward of a few tokens."""

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from pelt_fast.layouts.discovery import experts_in, why_no_block
from pelt_fast.layouts.layout import AttentionLayout, FFNLayout, Layout, StackLayout
from pelt_fast.layouts.lookup import base_of, find

from ..checks import check_not_sharded
from ..synthetic_batch import why_no_run
from ..unchanged import unchanged
from .attentions import Found, attentions, below
from .blocks import blocks, layout_of
from .graph import Graph
from .lists import Lists
from .prompts import prompt_of
from .trace import Trace, trace


def discover(model: nn.Module) -> Layout:
    """The layout of ``model``. ValueError where the model cannot be run here, or has no attention
    that was found."""
    check_not_sharded(model)
    base = base_of(model)
    why, stacks = why_no_run(base), ()
    if why is None:
        why, stacks = _found(base)
    if not stacks:
        why = why or "no attention was found in a list of layers of its forward"
        raise ValueError(
            f"no table row for architecture {model.config.model_type!r}, and its layout was not"
            f" found: {why}. Give one, inject(..., layout=Layout(...)): pelt-fast explain prints a"
            " draft"
        )
    prompt, no_prompt = prompt_of(base, stacks[0])
    first = replace(stacks[0], prompt=prompt, no_prompt=no_prompt)
    return Layout(model.config.model_type, (first, *stacks[1:]))


def _found(base: nn.Module) -> tuple[str | None, tuple[StackLayout, ...]]:
    """Why the base cannot be run, or None, and its stacks. The search for activations calls modules
    of the model after its forward."""
    with unchanged(base, training=False):
        try:
            ran = trace(base)
        except Exception as error:  # a model may raise anything on an unsuitable input
            return f"the base does not run on a few tokens ({type(error).__name__}: {error})", ()
        return None, tuple(_stacks(base, ran))


def _stacks(base: nn.Module, ran: Trace) -> Iterator[StackLayout]:
    """The stacks, an encoder's first."""
    graph = Graph(ran)
    found = attentions(ran, graph, base)
    lists = Lists(base, ran, found)
    made = [stack for path in lists.paths for stack in _of_list(base, path, lists, ran, graph)]
    return sorted(made, key=lambda stack: stack.kind != "encoder")


def _of_list(
    base: nn.Module, path: str, lists: Lists, ran: Trace, graph: Graph
) -> Iterator[StackLayout]:
    """One stack for each kind of layer in a list."""
    alike: dict[tuple, list[int]] = {}
    for index, own in lists.layers(path):
        layer = f"{path}.{index}"
        described = tuple(found.layout(layer) for found in own)
        ffn, why = _ffn(base, layer, own, ran, graph)
        if described or ffn is not None:
            alike.setdefault((described, ffn, why, _widths(own)), []).append(index)
    count = len(find(base, path))
    for (described, ffn, why, _), indices in alike.items():
        only = None if len(indices) == count else tuple(indices)
        yield StackLayout(_kind(described, path), lists.owner(path), path, described, ffn,
                          no_ffn=why, only=only)  # fmt: skip


def _widths(own: list[Found]) -> tuple:
    return tuple(
        (part, tuple(call.module.weight.shape) if hasattr(call.module, "weight") else None)
        for found in own for part, (call, _) in sorted(found.projections.items())
    )  # fmt: skip


def _kind(described: tuple[AttentionLayout, ...], path: str) -> str:
    kinds = {attention.kind for attention in described}
    if not kinds:
        return "encoder" if "encoder" in path else "decoder"
    return "decoder" if kinds & {"decoder", "cross"} else "encoder"


def _ffn(
    base: nn.Module, layer: str, own: list[Found], ran: Trace, graph: Graph
) -> tuple[FFNLayout | None, str]:
    """The block of a layer, and "" or why there is none."""
    experts = experts_in(find(base, layer))
    if experts:
        return None, why_no_block(experts[:2])
    taken = {call.path for found in own for call, _ in found.projections.values()}
    made = blocks(base, layer, graph, taken)
    if len(made) != 1:
        names = ", ".join(below(block.into.path, layer) for block in made)
        none = "no two linear layers with act(in(x)), or act(gate(x)) * in(x), between them"
        return None, f"{len(made)} blocks were found in it ({names})" if made else none
    modules = tuple(below(found.path, layer) for found in own)
    found = layout_of(base, layer, made[0], ran.calls, modules)
    return (None, found) if isinstance(found, str) else (found, "")
