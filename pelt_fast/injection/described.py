"""Where the layers of a model are: the caller's layout, a row of the table, or what is found."""

from torch import nn

from pelt_fast.config.named_modules import MODULES
from pelt_fast.layouts.layout import Layout, StackLayout
from pelt_fast.layouts.lookup import NoRow, stacks_of
from pelt_fast.layouts.parts import Parts, parts_of

from .discovery.discover import discover
from .record import Injection


def described(model: nn.Module, layout: Layout | None, injection: Injection) -> list[StackLayout]:
    """The stacks with the parts that the method uses; ``injection`` records a layout that is not a
    row of the table. Raises ValueError where a part is not there, or was not found."""
    by_layout = [m for m in injection.config.modifications if m.target != MODULES]
    if injection.config.is_full or not by_layout:
        return []
    parts = parts_of(by_layout)
    if layout is None:
        layout = injection.layout  # of the methods that are in the model already
    try:
        stacks = stacks_of(model, layout, parts)
    except NoRow:
        layout, injection.discovered = discover(model), True
        stacks = stacks_of(model, layout, parts)
    _refuse_unknown(model, stacks, parts)
    injection.layout = layout
    return stacks


def stacks_found(model: nn.Module) -> list[StackLayout]:
    """All stacks of ``model``, by its row or by what is found on it."""
    try:
        return stacks_of(model)
    except NoRow:
        return list(discover(model).stacks)


def _refuse_unknown(model: nn.Module, stacks: list[StackLayout], parts: Parts) -> None:
    """ValueError for a part that the method uses and that discovery did not find. A caller's layout
    may be a discovered one."""
    for stack in stacks:
        for attention in stack.attentions:
            for part, why in attention.unknown:
                if (attention.kind, part) in parts:
                    module = attention.module or "the attention"
                    which = "" if stack.only is None else f" ({_listed(stack.only)})"
                    raise ValueError(
                        f"{type(model).__name__}: of {module} in its {stack.layers}{which} this"
                        f" method needs {_NEEDED[part]}: {why}. Choose a method that needs none,"
                        " or give a layout= that names it"
                    )


_NEEDED = {
    "q": "the query projection", "k": "the key projection", "v": "the value projection",
    "out": "the output projection", "input": "an input that its queries are made of",
    "heads": "keys and values that a prefix can stand before",
}  # fmt: skip


def _listed(only: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, only[:6]))
    return shown + ", .." if len(only) > 6 else shown
