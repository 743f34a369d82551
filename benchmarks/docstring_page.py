"""A signature and a docstring as Markdown: a parameter a line, the sections as lists and code."""

import inspect
import re

WIDTH = 100
# sections whose lines are NAME: TEXT
_NAMED = ("Args", "Raises", "Attributes")
_SECTION = re.compile(r"^(Args|Returns|Raises|Saved|Attributes|Example|Examples):$")
_ITEM = re.compile(r"^`?(\**\w[\w.*, ]*?)`?(?: \(([^)]*)\))?: ")


def signature(name: str, value) -> str:
    """The call of ``value``: on one line, or a parameter a line where that is too long."""
    try:
        found = _signature_of(value)
    except (TypeError, ValueError):
        return name
    if len(line := _short(f"{name}{found}")) <= WIDTH or not found.parameters:
        return line
    body = "".join(f"    {_short(part)},\n" for part in _parameters(found))
    return f"{name}(\n{body}{line[line.rindex(')') :]}"


def _parameters(found: inspect.Signature) -> list[str]:
    """Each parameter, and the star before the parameters that are given by keyword."""
    kinds = [value.kind for value in found.parameters.values()]
    parts = [str(value) for value in found.parameters.values()]
    keyword, star = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
    if keyword in kinds and star not in kinds:
        parts.insert(kinds.index(keyword), "*")
    return parts


def _signature_of(value) -> inspect.Signature:
    """With its annotations as objects where their names can be found."""
    try:
        return inspect.signature(value, eval_str=True)
    except NameError:
        return inspect.signature(value)


def _short(text: str) -> str:
    """Without the modules in front of names."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)


def markdown(docstring: str) -> str:
    """A docstring in Markdown; text without sections does not change."""
    text = re.sub(r":(?:func|class|meth|mod):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", docstring)
    title, blocks = "", {"": []}
    for line in text.splitlines():
        found = _SECTION.match(line)
        title = found[1] if found else title
        if found:
            blocks[title] = []
        else:
            blocks[title].append(line)
    bodies = {name: inspect.cleandoc("\n".join(["", *lines])) for name, lines in blocks.items()}
    return "\n\n".join(_block(name, body) for name, body in bodies.items() if body)


def _block(title: str, body: str) -> str:
    """One section."""
    if title.startswith("Example"):
        return f"**Example**\n\n```python no-run: from a docstring\n{body}\n```"
    body = body.replace("``", "`")
    if not title:
        return body
    if title in _NAMED:
        return f"**{title}**\n\n{_items(body)}"
    return f"**{title}**: {body}"


def _items(body: str) -> str:
    """Lines NAME: TEXT, each with the indented lines below it, as a list."""
    lines = [line for line in re.sub(r"\n[ ]+", " ", body).splitlines() if line]
    return "\n".join(_ITEM.sub(_item, line) for line in lines)


def _item(found: re.Match) -> str:
    kind = f" ({found[2]})" if found[2] else ""
    return f"- `{found[1]}`{kind}: "
