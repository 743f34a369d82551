"""A layout as the Python that makes it."""

import dataclasses

from .layout import AttentionLayout, FFNLayout, Layout, StackLayout

DISCOVERED = (
    "No row of the table describes this model: its layout was discovered in a forward of a few"
    " tokens, and proved there with an update of zero."
)


def written(layout: Layout) -> str:
    """Python that makes ``layout``, a line for each part.

    Example:
        print(written(layout))
    """
    stacks = "".join(f"    {_stack(stack)},\n" for stack in layout.stacks)
    return f"Layout({layout.model_type!r}, (\n{stacks}))"


def _stack(stack: StackLayout) -> str:
    attentions = "".join(f"\n        {_part(attention)}," for attention in stack.attentions)
    ffn = "None" if stack.ffn is None else _part(stack.ffn)
    more = "".join(
        f", {name}={value!r}" for name in ("prompt", "no_ffn", "no_prompt", "only")
        if (value := getattr(stack, name))
    )  # fmt: skip
    return (
        f"StackLayout({stack.kind!r}, {stack.owner!r}, {stack.layers!r}, ({attentions}\n    ),"
        f" {ffn}{more})"
    )


def _part(part: AttentionLayout | FFNLayout) -> str:
    """The required fields by position, and the others where they are not the default."""
    values = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.default is dataclasses.MISSING:
            values.append(repr(value))
        elif value != field.default:
            values.append(f"{field.name}={value!r}")
    return f"{type(part).__name__}({', '.join(values)})"
