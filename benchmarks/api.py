"""docs/api.md: every public name, its signature and docstring, from the package itself.

python -m benchmarks.api           writes the page
python -m benchmarks.api --check   exit 1 when it is not what the package says
"""

import argparse
import inspect
import re
import sys

import pelt_fast
from benchmarks.common import REPOSITORY
from pelt_fast import functional

PAGE = REPOSITORY / "docs" / "api.md"
HEAD = """# API

Written by `python -m benchmarks.api` from signatures and docstrings. What is on it is public:
see *Versions* in the README.
"""


def _signature(name: str, value) -> str:
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        return name
    return name + re.sub(r"(?<![\w.])(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", signature)


def _entry(name: str, value) -> str:
    text = inspect.cleandoc(inspect.getdoc(value) or "")
    return f"### {name}\n\n```\n{_signature(name, value)}\n```\n\n{markdown(text)}\n"


def markdown(docstring: str) -> str:
    """A docstring's text, with its sections (Args, Returns, Raises, Saved, Example) as headings,
    lists and code."""
    text, *sections = re.split(rf"^({'|'.join(SECTIONS)}):\n", docstring, flags=re.MULTILINE)
    parts = [_inline(text.strip())]
    for title, body in zip(sections[::2], sections[1::2]):
        parts.append(f"**{title}**\n\n{SECTIONS[title](inspect.cleandoc(body))}")
    return "\n\n".join(parts)


def _inline(text: str) -> str:
    text = re.sub(r":(?:func|class|meth|mod):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    text = re.sub(
        r"docs/(\w+\.md)(#[\w-]+)?", lambda link: f"[{link[0]}]({link[1]}{link[2] or ''})", text
    )
    return text.replace("``", "`")


def _items(body: str) -> str:
    """A list of ``name: text``; a line that is indented continues the one before it."""
    items = re.split(r"\n(?=\S)", body.strip())
    return "\n".join(f"- {_item(inspect.cleandoc(item))}" for item in items)


def _item(item: str) -> str:
    name, colon, text = item.partition(": ")
    if not colon or not re.fullmatch(r"[\w.*, ]+", name):
        return _inline(item).replace("\n", "\n  ")
    return f"`{name}`: {_inline(text)}".replace("\n", "\n  ")


def _code(body: str) -> str:
    language = "pycon" if body.startswith(">>>") else "python"
    return f"```{language}\n{body.strip()}\n```"


SECTIONS = {
    "Args": _items,
    "Returns": _inline,
    "Raises": _items,
    "Saved": _inline,
    "Example": _code,
}


def _entries(module, names: list[str]) -> list[str]:
    found = [(name, getattr(module, name)) for name in names]
    return [_entry(name, value) for name, value in found if callable(value)]


def document() -> str:
    """The whole page."""
    return "\n".join([
        HEAD, "## pelt_fast\n", *_entries(pelt_fast, pelt_fast.__all__),
        "## pelt_fast.functional\n", *_entries(functional, functional.__all__),
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(PAGE.read_text() != document())
    PAGE.write_text(document())
    return 0


if __name__ == "__main__":
    sys.exit(main())
