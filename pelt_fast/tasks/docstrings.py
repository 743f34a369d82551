"""A data set of real text that every machine has: which package is this paragraph from?

Paragraphs of the docstrings of installed packages, read from source without importing anything.
Whole modules go to the training or to the held-out half. Paragraphs that name a package are left
out, and so are repeated paragraphs.
"""

import ast
import hashlib
import importlib.util
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Split:
    """Texts and labels of one split."""

    texts: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ClassificationData:
    """A training and an evaluation split, and the classes by name."""

    train: Split
    evaluation: Split
    classes: tuple[str, ...]


PACKAGES = ("torch", "transformers", "numpy", "sympy", "networkx", "matplotlib")
MIN_CLASSES = 4
_HELD_OUT = 3  # one module in three
_LENGTH = range(60, 320)  # characters


def build(paragraphs: int = 3000, packages: tuple[str, ...] = PACKAGES) -> ClassificationData:
    """A balanced data set of at least ``paragraphs`` paragraphs from the packages found here.

    Raises RuntimeError when fewer than four packages have enough text.
    """
    names = _naming(packages)
    # enough of each class even if only MIN_CLASSES packages are here
    most = _share(-(-paragraphs // MIN_CLASSES))
    seen: set[str] = set()
    found = {name: _halves(name, names, seen, most) for name in packages}
    classes = [name for name, halves in found.items() if _enough(halves, _share(paragraphs // 6))]
    if len(classes) < MIN_CLASSES:
        raise RuntimeError(
            f"docstrings of {MIN_CLASSES} of {', '.join(packages)} are needed, found enough of"
            f" {', '.join(classes) or 'none'}"
        )
    share = _share(-(-paragraphs // len(classes)))
    splits = [_split([found[name][half] for name in classes], share[half]) for half in (0, 1)]
    return ClassificationData(*splits, tuple(classes))


def _share(paragraphs: int) -> tuple[int, int]:
    """How many of a class's paragraphs are for training and held out."""
    held_out = paragraphs // _HELD_OUT
    return paragraphs - held_out, held_out


def _enough(halves: tuple[list[str], list[str]], share: tuple[int, int]) -> bool:
    return all(len(half) >= size for half, size in zip(halves, share, strict=True))


def _naming(packages: tuple[str, ...]) -> re.Pattern:
    """Words that tell which package a text is from."""
    words = [*packages, "pytorch", "np", "plt", "nx", "hugging", "tensor", "ndarray", "axes"]
    return re.compile(r"\b(" + "|".join(words) + r")", re.IGNORECASE)


def _split(by_class: list[list[str]], size: int) -> Split:
    """The first ``size`` of each class, in an order that depends on the text alone."""
    rows = [(text, label) for label, texts in enumerate(by_class) for text in texts[:size]]
    rows.sort(key=lambda row: _digest(row[0]))
    return Split([text for text, _ in rows], [label for _, label in rows])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _halves(
    package: str, names: re.Pattern, seen: set[str], most: tuple[int, int]
) -> tuple[list[str], list[str]]:
    """Training and held-out paragraphs of a package, module by module until there are ``most``."""
    halves: tuple[list[str], list[str]] = ([], [])
    for module, path in sorted(_modules(package), key=lambda found: _digest(found[0])):
        if _enough(halves, most):
            break
        half = halves[_digest(module) % _HELD_OUT == 0]
        for text in _paragraphs(path):
            if text not in seen and not names.search(text):
                seen.add(text)
                half.append(text)
    for half in halves:
        half.sort(key=_digest)
    return halves


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """Names and files of a package's modules, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(next(iter(spec.submodule_search_locations)))
    for path in root.rglob("*.py"):
        if "test" not in path.relative_to(root).as_posix():
            yield f"{package}/{path.relative_to(root).as_posix()}", path


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for block in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(textwrap.dedent(block).split())
                if len(text) in _LENGTH and _is_prose(text):
                    yield text


def _is_prose(text: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in text)
    return ">>>" not in text and letters > 0.85 * len(text) and len(text.split()) >= 8
