"""Sections of docs/codegen.md that commands write."""

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "codegen.md"


def put(name: str, lines: list[str]) -> None:
    """Put lines in the place of the section called ``name``, or at the end of the page."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = PAGE.read_text().partition(begin)
    after = rest.partition(end)[2] if rest else ""
    section = "\n".join([begin, *lines, end])
    PAGE.write_text(before.rstrip() + "\n\n" + section + (after or "\n"))
    print(f"wrote {PAGE.name}")
