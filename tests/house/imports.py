"""The imports of every file of a tree, read with ``ast``: those inside functions too.

A file is named as it is imported: ``kernels/tiles.py`` is ``pelt_fast.kernels.tiles``. Imports under
``if TYPE_CHECKING:`` are left out, the compiled modules ``_C`` and ``_C_cuda`` too.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# folder of the tree: what its files are imported as
FOLDERS = {"pelt_fast": "pelt_fast", "kernels": "pelt_fast.kernels", "benchmarks": "benchmarks"}
OURS = ("pelt_fast", "benchmarks", "tests")
COMPILED = ("pelt_fast._C", "pelt_fast._C_cuda")


@dataclass(frozen=True, order=True)
class Edge:
    """One import: the file that imports, what it imports, both by dotted name."""

    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


def files(root: Path) -> dict[str, Path]:
    """Dotted name: path, of every Python file under ``FOLDERS``."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            if path.is_relative_to(root / "pelt_fast" / "kernels"):
                continue  # the link to kernels/
            steps = path.relative_to(root / folder).with_suffix("").parts
            steps = steps[:-1] if steps[-1:] == ("__init__",) else steps
            found[".".join([name, *steps])] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, read once."""
    return ast.parse(path.read_text())


@functools.cache
def edges(root: Path) -> list[Edge]:
    """Every import of one of our files or of ``tests``, each once."""
    names = files(root)
    found = set()
    for name, path in names.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for target in _targets(parsed(path), package, names):
            if target.split(".")[0] in OURS and target not in (name, *COMPILED):
                found.add(Edge(name, target))
    return sorted(found)


def _targets(tree: ast.AST, package: str, names: dict[str, Path]) -> Iterator[str]:
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node.module or "", node.level, package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in names or full in COMPILED else base
        elif isinstance(node, ast.Call):
            yield from _imported_by_call(node, package)


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node, but for the bodies of ``if TYPE_CHECKING:``."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _nodes(other)
        else:
            yield from _nodes(child)


def _absolute(module: str, level: int, package: str) -> str:
    if level == 0:
        return module
    steps = package.split(".")
    steps = steps[: len(steps) - (level - 1)]
    return ".".join([*steps, *filter(None, [module])])


def _imported_by_call(node: ast.Call, package: str) -> Iterator[str]:
    """``importlib.import_module("a.b")``, ``__import__("a.b")``: names that are written out."""
    function = ast.unparse(node.func).split(".")[-1]
    if function not in ("import_module", "__import__") or not node.args:
        return
    name = node.args[0]
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        module = name.value.lstrip(".")
        yield _absolute(module, len(name.value) - len(module), package)


def circle(found: list[Edge]) -> list[str]:
    """The names of one circle of files, first and last the same; [] without one."""
    following: dict[str, list[str]] = {}
    for edge in found:
        following.setdefault(edge.source, []).append(edge.target)
    done: set[str] = set()
    for start in sorted(following):
        way = _walk(start, following, done, [])
        if way:
            return way
    return []


def _walk(name: str, following: dict, done: set[str], way: list[str]) -> list[str]:
    if name in way:
        return [*way[way.index(name) :], name]
    if name in done:
        return []
    for after in following.get(name, ()):
        found = _walk(after, following, done, [*way, name])
        if found:
            return found
    done.add(name)
    return []
