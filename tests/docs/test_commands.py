"""The commands that README.md and docs/ show are ones that exist."""

import argparse
import importlib
import re
import shlex

import pytest

from benchmarks.arguments import parse
from pelt_fast.cli import COMMANDS
from pelt_fast.tasks import recipe as recipes
from tests.docs.blocks import PAGES, ROOT, named

TEXTS = {page: page.read_text() for page in PAGES}
_FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def lines_of(program: str) -> list[tuple[str, str]]:
    """(page, line) of each line in a fence that runs the program, without its comment."""
    return [
        (named(page), line.partition("#")[0].strip())
        for page, text in TEXTS.items()
        for block in _FENCE.findall(text)
        for line in block.splitlines()
        if line.startswith(f"{program} ")
    ]


@pytest.mark.parametrize("page, line", lines_of("pelt-fast"))
def test_a_command_line_is_understood(page, line):
    _, command, *arguments = shlex.split(line)
    assert command in COMMANDS
    if command == "bench":
        parse(arguments)
        return
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"pelt_fast.cli.{command}").add_arguments(parser)
    options = parser.parse_args(arguments)
    if getattr(options, "recipe", None):
        recipes.load(options.recipe)


def test_every_target_of_make_is_in_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {word for text in TEXTS.values() for word in re.findall(r"`make (\w+)", text)}
    shown |= {line.split()[1] for _, line in lines_of("make")}
    assert shown and shown <= targets


def test_every_module_that_a_page_runs_is_there():
    shown = {name for text in TEXTS.values() for name in re.findall(r"`python -m ([\w.]+)", text)}
    paths = {name: ROOT / name.replace(".", "/") for name in shown}
    missing = {
        name
        for name, path in paths.items()
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists()
    }
    assert missing <= {"benchmarks.ops"}  # facts.md says which command took its place
