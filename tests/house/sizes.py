"""How large a file, a function and a list of parameters may be, and what a backward may read."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from .imports import files, parsed

LINES, PARAMETERS, MEDIAN = 350, 8, 25
FOLDERS = ("pelt_fast", "kernels", "csrc", "benchmarks")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
BOUND = ("self", "cls", "ctx")  # what Python or autograd gives, not the caller


def files_are_short(root: Path) -> Iterator[str]:
    """No file has more than 350 lines."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SUFFIXES and path.is_file():
                lines = len(path.read_text().splitlines())
                if lines > LINES:
                    yield f"{path.relative_to(root)}: {lines} lines, at most {LINES}"


# its ninth parameter is public since 0.1.0: callers may give it by position
PUBLIC_OF_0_1_0 = {"ffn_parallel_adapter"}


def few_positional_parameters(root: Path) -> Iterator[str]:
    """No host function takes more than eight positional parameters; kernels are exempt."""
    for name, function in _host_functions(root):
        arguments = function.args.posonlyargs + function.args.args
        count = len(arguments) - (arguments[:1] != [] and arguments[0].arg in BOUND)
        if count > PARAMETERS and function.name not in PUBLIC_OF_0_1_0:
            yield f"{name}.{function.name}: {count} positional parameters, at most {PARAMETERS}"


def functions_are_short(root: Path) -> Iterator[str]:
    """Half of the host functions have at most 25 lines."""
    lengths = [f.end_lineno - f.lineno + 1 for _, f in _host_functions(root)]
    if lengths and median(lengths) > MEDIAN:
        yield f"the median function has {median(lengths):g} lines, at most {MEDIAN}"


def saved_tensors_are_read_once(root: Path) -> Iterator[str]:
    """A backward reads its saved tensors once: a checkpoint gives them once."""
    for name, function in _host_functions(root):
        reads = [
            node for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and node.attr == "saved_tensors"
        ]  # fmt: skip
        if len(reads) > 1:
            yield f"{name}.{function.name}: reads saved_tensors {len(reads)} times, at most once"


def a_struct_has_a_name_of_its_own(root: Path) -> Iterator[str]:
    """No two headers of csrc define a struct of one name: the linker would take either of them."""
    known: dict[str, Path] = {}
    for path in sorted((root / "csrc").rglob("*.h")) + sorted((root / "csrc").rglob("*.cuh")):
        for name in dict.fromkeys(re.findall(r"^struct (\w+) ", path.read_text(), re.MULTILINE)):
            other = known.setdefault(name, path)
            if other is not path:
                yield f"{path.relative_to(root)}: struct {name} is in {other.relative_to(root)} too"


def _host_functions(root: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function outside kernels, with the name of its file."""
    for name, path in files(root).items():
        if name.startswith("pelt_fast.kernels"):
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, node


RULES = (
    files_are_short, few_positional_parameters, functions_are_short, saved_tensors_are_read_once,
    a_struct_has_a_name_of_its_own,
)  # fmt: skip
