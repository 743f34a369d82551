"""docs/api.md: every public name, its signature and docstring, from the package itself.

python -m benchmarks.api           writes the page
python -m benchmarks.api --check   exit 1 when the page differs from the package
"""

import argparse
import inspect
import sys

import pelt_fast
from benchmarks.common import REPOSITORY
from benchmarks.docstring_page import markdown, signature
from pelt_fast import functional

PAGE = REPOSITORY / "docs" / "api.md"
HEAD = """# API

Written by `python -m benchmarks.api` from signatures and docstrings. Every name on this page is
public: see [Versions](install.md#versions).
"""


def _entry(name: str, value) -> str:
    text = markdown(inspect.getdoc(value) or "")
    return f"### {name}\n\n```\n{signature(name, value)}\n```\n\n{text}\n"


def _entries(module, names: list[str]) -> list[str]:
    found = [(name, getattr(module, name)) for name in names]
    return [_entry(name, value) for name, value in found if callable(value)]


def _functions() -> list[str]:
    """The public functions of ``functional``, whether it defines or re-exports them."""
    return getattr(functional, "__all__", None) or [
        name for name, value in vars(functional).items()
        if inspect.isfunction(value) and value.__module__ == functional.__name__
        and not name.startswith("_")
    ]  # fmt: skip


def document() -> str:
    """The whole page."""
    return "\n".join([
        HEAD, "## pelt_fast\n", *_entries(pelt_fast, pelt_fast.__all__),
        "## pelt_fast.functional\n", *_entries(functional, _functions()),
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
